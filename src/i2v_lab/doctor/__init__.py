"""What a machine and its packages lack for i2v-lab."""
