"""Process group, device selection and gradient reduction."""
