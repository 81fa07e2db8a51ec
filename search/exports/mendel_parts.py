"""The config classes of a model's operators: an export writes its own table in this place."""

CLASSES: dict[str, type] = {}
