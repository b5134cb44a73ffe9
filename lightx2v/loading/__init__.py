"""From files to networks on a device: locate, load, add LoRAs, convert, keep."""
