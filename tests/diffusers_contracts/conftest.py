"""The markers of diffusers' common tests: pytest runs with `--strict-markers` here."""

DIFFUSERS_MARKERS = """
    attention autoround big_accelerator bitsandbytes cache compile context_parallel cpu_offload gguf group_offload
    ip_adapter lora memory modelopt nightly nunchaku_lite quantization quanto sdnq single_file tensor_parallel
    torch_compile torchao training
"""


def pytest_configure(config):
    for name in DIFFUSERS_MARKERS.split():
        config.addinivalue_line("markers", f"{name}: a marker of diffusers' common tests")
