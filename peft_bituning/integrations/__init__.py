"""The package beside other libraries; optional, imported by no other room."""
