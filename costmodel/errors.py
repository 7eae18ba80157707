"""Errors of the cost model.

InputError (shardplan.models.errors)
├── DataFileError      a TOML file breaks its own rules: file, key, rule
└── CalibrationError   a calibration has no coefficients for what is asked
"""

from __future__ import annotations

from shardplan.models.errors import InputError

__all__ = ["CalibrationError", "DataFileError"]


class DataFileError(InputError):
    """A device, cluster, engine or calibration file that breaks its own rules."""

    code = "bad_data_file"


class CalibrationError(InputError):
    """A calibration without the coefficients that a formula needs."""

    code = "no_calibration"
