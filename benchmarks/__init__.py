"""Programs that measure speed and accuracy, beside other implementations."""
