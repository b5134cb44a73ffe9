#!/usr/bin/env bash
# Image to video in 4 steps with the distilled LoRAs, on several GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../../base/base.sh"

show "The camera slowly moves closer while the light changes." "$lightx2v_path/assets/demo/examples/red_heart_sunset.png"
infer_parallel i2v_distill_lora "$@"
