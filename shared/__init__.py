"""What server and site both need: the study, messages, networks, primitives, errors."""
