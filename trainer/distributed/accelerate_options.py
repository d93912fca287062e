"""Reads what `accelerate launch` was asked for: obeys it where a setting is auto, names the setting to use, or refuses.

`accelerate launch` passes its options in variables, and may take them from a file in the home folder without a message.
Imports no torch.
"""

import os
from dataclasses import dataclass

from trainer.config.schema import TrainSettings
from trainer.errors import WorldError

# Ways to train that would change what a step computes, or that no code here supports.
_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP (--use_fsdp)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (--use_deepspeed)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (--use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism (--use_parallelism_config)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_TRUE, _FALSE = {"1", "y", "yes", "t", "true", "on"}, {"", "0", "n", "no", "f", "false", "off"}
_PRECISIONS = {"": None, "no": None, "bf16": "bf16", "fp16": "fp16"}
_ACCUMULATION_OPTION = "--gradient_accumulation_steps"


@dataclass(frozen=True, slots=True)
class AccelerateOptions:
    """The options of `accelerate launch` that count."""

    precision: str | None
    """bf16 or fp16; None without --mixed_precision, and for `no`, which accelerate launch sets on its own"""
    use_cpu: bool
    ignored: tuple[str, ...]
    """a line for each option that has no effect, with the setting to use instead"""


def read_accelerate_options(train: TrainSettings) -> AccelerateOptions:
    """Returns the options; without `accelerate launch` none is set.

    Raises WorldError for an option that we cannot obey, and for a value that accelerate launch would not write.
    """
    for variable, name in _REFUSED.items():
        if _read_flag(variable):
            raise WorldError(
                f"{variable} asks for {name}; samecurve trains with plain "
                "data parallelism. Remove the option, or use a file of launch/accelerate/ with --config_file"
            )
    text = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if text not in _PRECISIONS:
        raise WorldError(
            f"accelerate launch --mixed_precision {text[:20]!r} (ACCELERATE_MIXED_PRECISION): expected no, bf16 or "
            "fp16; leave it out and set train.precision"
        )
    precision = _PRECISIONS[text]
    ignored = []
    if precision and train.precision not in ("auto", precision):
        ignored.append(f"--mixed_precision {precision} is ignored: train.precision={train.precision}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower()
    if backend not in _FALSE and not train.compile:
        ignored.append(f"--dynamo_backend {backend[:20]!r} is ignored: set train.compile=true")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or _option_of_launcher(_ACCUMULATION_OPTION)
    if steps not in ("", "1"):
        ignored.append(
            f"{_ACCUMULATION_OPTION} {steps[:20]!r} is ignored: data.global_batch_size is the whole batch of a step; "
            "set train.virtual_ranks to compute it in parts"
        )
    if os.environ.get("ACCELERATE_TORCH_DEVICE"):
        ignored.append("ACCELERATE_TORCH_DEVICE is ignored: set train.device or CUDA_VISIBLE_DEVICES")
    if os.environ.get("ACCELERATE_CPU_AFFINITY", "").lower() not in _FALSE:
        ignored.append("--enable_cpu_affinity is ignored: start the ranks under numactl")
    lines = tuple(f"accelerate launch {text}" for text in ignored)
    return AccelerateOptions(precision, _read_flag("ACCELERATE_USE_CPU"), lines)


def _read_flag(variable: str) -> bool:
    value = os.environ.get(variable, "").lower()
    if value not in _TRUE | _FALSE:
        raise WorldError(f"{variable}={value[:20]!r}: expected true or false; correct it, or run: unset {variable}")
    return value in _TRUE


def _option_of_launcher(option: str) -> str:
    """Returns the value of an option on the command line of `accelerate launch`, which it keeps to itself; or ""."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return ""
    import psutil  # lazy import: only under accelerate launch

    try:
        words: list[str] = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:  # the launcher has ended, or belongs to another user
        return ""
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == option.replace("-", "_"):
            return value or next_word
    return ""
