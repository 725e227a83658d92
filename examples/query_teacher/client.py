"""What `--teacher-query` calls: `ask` sends the images to the service and returns its probabilities.

    accelerate launch train_distill.py --student resnet18 --teacher-query examples.query_teacher.client:ask

QUERY_TEACHER_URL names another address than http://127.0.0.1:8000.
"""

from __future__ import annotations

import io
import os
import urllib.request

import numpy as np

URL = os.environ.get('QUERY_TEACHER_URL', 'http://127.0.0.1:8000')


def ask(images: np.ndarray) -> np.ndarray:
    """Return the service's probabilities, float32 [B, classes], for uint8 images [B, H, W, C]."""
    body = io.BytesIO()
    np.save(body, images, allow_pickle=False)
    request = urllib.request.Request(f'{URL}/ask', data=body.getvalue(), method='POST')
    try:
        with urllib.request.urlopen(request, timeout=50) as reply:
            return np.load(io.BytesIO(reply.read()), allow_pickle=False)
    except OSError as e:
        raise ConnectionError(f'{e} at {URL} (service.py runs there? QUERY_TEACHER_URL names another address)') from e
