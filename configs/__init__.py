"""One JSON file for each run. A package only so that an installed dsfast carries them, as dsfast.configs."""
