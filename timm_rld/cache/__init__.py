"""A teacher's logits on disk: computed once for the images of the first K epochs, then read.

DIR/cache.json                   what the logits depend on, and how to compute them again
DIR/epoch-0001.safetensors …     a row for each training image, as it is augmented in epoch 1, …
DIR/validation-….safetensors     a row for each validation image, as the student sees it
"""

from .answers import AnswersFile, answers_kind
from .key import CacheKey
from .rows import DTYPES, Rows, rounded
from .teacher_cache import TeacherCache
from .verify import verify

__all__ = ['answers_kind', 'AnswersFile', 'CacheKey', 'DTYPES', 'rounded', 'Rows', 'TeacherCache', 'verify']
