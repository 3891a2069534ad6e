"""What tests of several wings share."""

from pathlib import Path

#: The folder of the project.
PROJECT = Path(__file__).parents[2]
