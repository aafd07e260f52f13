"""Models, sizes and limits of the comparison."""

GIB = 2**30
LENGTH = 8192
# What the CUDA context takes of a card beside the peer's allocator, which alone the cap limits.
CONTEXT = 0.5
# Seconds of each section, for a total of just under 12 minutes. What one leaves, the next ones may use.
SECONDS = {"scan": 80, "gemm": 50, "step353": 90, "step972": 105, "longest": 90, "start": 55,
           "prefill": 30, "decode": 200}
# Exit code of the program when the device's memory does not suffice.
OUT_OF_MEMORY = 6

# Shapes as in mamba-ssm's own models: RMSNorm, tied head.
PEER_MODELS = {
    "353M": {"d_model": 1024, "n_layer": 53},
    "972M": {"d_model": 1792, "n_layer": 48},
}
# (batch, layers checkpointed): the peer's fastest that fit 24 GiB, and the nearest rivals.
PEER_STEPS = {"353M": [(2, 0)], "972M": [(1, 16), (2, 40)]}
CONFIGS = {"353M": "pg19_353m.toml", "972M": "pg19_972m.toml"}
# (model, batch, new bytes) of generation from prompts of 64 bytes.
WRITING = [("353M", 1, 1024), ("353M", 128, 256), ("972M", 1, 8192)]
# (name, inputs, outputs) of the products of a layer with D = 1024.
PRODUCTS = [("in_proj", 1024, 4096), ("out_proj", 2048, 1024), ("x_proj", 2048, 96), ("dt_proj", 64, 2048)]
