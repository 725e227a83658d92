"""A teacher's logits on disk: computed once for the first K epochs' views of a dataset, then read.

DIR/cache.json                   what the logits depend on, and how to compute them again
DIR/view-0001.safetensors …      a row for each training image, as the student sees it in epoch 1, …
DIR/validation-….safetensors     a row for each validation image, as the student sees it
"""

from ._rows import DTYPES, Rows, rounded
from .facts import Purpose, weights_file
from .teacher import TeacherCache
from .verify import verify

__all__ = ['DTYPES', 'Purpose', 'Rows', 'TeacherCache', 'rounded', 'verify', 'weights_file']
