"""Whole trainings on top of cyclekd; in a checkout their sources lie in integrations/, in a wheel beside this file."""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "integrations").is_dir():
    __path__.append(str(_CHECKOUT / "integrations"))
