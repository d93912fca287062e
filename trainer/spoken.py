"""Numbers in, words for people out."""


def duration(seconds: float) -> str:
    """3:07:55, 7:55, or 5.2 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"
