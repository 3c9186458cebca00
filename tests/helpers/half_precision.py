"""The dtypes of half precision, as parameters of tests on the CPU, and what they need of torch."""

import pytest
import torch
from mmengine.utils import digit_version

needs_float16 = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch < 2.4 does not compute in float16 on the CPU',
)
needs_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='torch < 2.3 has no loss scaler for the CPU'
)
HALF_DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=needs_float16)]
