"""What the rest needs of an array library, a device and the operating system."""
