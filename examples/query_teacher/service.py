"""A teacher as a service: any timm model behind HTTP. It gives probabilities, and nothing else of the model.

    pip install fastapi uvicorn
    python examples/query_teacher/service.py --model resnet34.a1_in1k --port 8000

POST /ask with uint8 images [B, H, W, C] as .npy bytes answers float32 probabilities [B, classes] as .npy bytes.
"""

from __future__ import annotations

import argparse
import io
import threading

import numpy as np
import timm
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

import timm_rld  # noqa: F401  (the CIFAR networks, `cifar_…`)
from timm_rld.pairing import Teacher


def answer_for(teacher: Teacher, images: np.ndarray) -> np.ndarray:
    """Return probabilities. Those of an image do not depend on the images beside it: each is computed alone, since a
    network gives other last bits in another batch."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([teacher(image[None]).softmax(dim=1) for image in pixels]).float().numpy()


def create_app(teacher: Teacher) -> FastAPI:
    """Return the service."""
    app, lock = FastAPI(), threading.Lock()

    def answer(data: bytes) -> bytes:
        reply = io.BytesIO()
        with lock:
            np.save(reply, answer_for(teacher, np.load(io.BytesIO(data), allow_pickle=False)), allow_pickle=False)
        return reply.getvalue()

    @app.get('/health')
    def health() -> str:
        return 'ok'

    @app.post('/ask')
    async def ask(request: Request) -> Response:
        return Response(await run_in_threadpool(answer, await request.body()), media_type='application/octet-stream')

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='what timm.create_model takes: resnet34, local-dir:PATH, …')
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=8000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = Teacher(timm.create_model(args.model, pretrained=True))
    uvicorn.run(create_app(teacher), host=args.host, port=args.port, log_level='warning')


if __name__ == '__main__':
    main()
