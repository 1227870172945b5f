"""What tests share: devices, programs to run beside pytest."""
