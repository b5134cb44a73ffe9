#!/usr/bin/env bash
# Wan2.2-I2V-A14B, 40 steps, on one GPU. With --set cpu_offload=true it needs less of its memory.
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

show "The camera slowly moves closer while the light changes." "$lightx2v_path/assets/demo/examples/red_heart_sunset.png"
infer i2v_base "$@"
