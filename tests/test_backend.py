"""What every CUDA op asks of the device and of its tensors before a launch."""

import itertools

import pytest
import torch

from specvlm_kernels import backend, launches


def test_alignment_looks_at_address_rows_and_every_stride() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        base, unit = torch.zeros(4096, dtype=dtype), 16 // dtype.itemsize
        start = next(i for i in range(unit) if (base.data_ptr() + i * dtype.itemsize) % 16 == 0)
        for offset, strides, last in itertools.product((0, 1), itertools.product((8, 16, 12, 9), repeat=2), (8, 12, 7)):
            x = base.as_strided((3, 2, last), (*strides, 1), start + offset)
            aligned = offset == 0 and all(size % unit == 0 for size in (*strides, last))
            assert (backend.misaligned("x", x) is None) == aligned, (dtype, offset, strides, last)


@pytest.mark.gpu
def test_raw_stream_and_device_are_pytorch_s() -> None:
    index = torch.cuda.current_device()
    side = torch.cuda.Stream()
    assert launches.raw_stream(index) == torch.cuda.current_stream().cuda_stream
    with torch.cuda.stream(side):
        assert launches.raw_stream(index) == side.cuda_stream != 0
    for other in range(torch.cuda.device_count()):
        with launches.on_device(other):
            assert torch.cuda.current_device() == other
        assert torch.cuda.current_device() == index
