"""SOP: scalable online post-training for vision-language-action policies. Start reading at `sop/system.py`."""

__version__ = "0.1.0"
