"""Teacher and student: where they may differ, in classes, size, channels, normalisation and weights."""

from .class_map import find_classes, match_classes, read_class_map, simple_name
from .features import (
    FeatureMap,
    Features,
    MapPairs,
    Taps,
    WithFeatures,
    forward_with_features,
    look_at_features,
    pair_maps,
)
from .heads import enable_distilled_training, has_distillation_head, in_distilled_training, outputs_of_heads
from .pair import Pair, audit, check_kwargs, create_pair, create_student, create_teacher, teacher_skeleton
from .query import (
    ClosedTeacher,
    Queries,
    QueryError,
    QueryTeacher,
    TeacherQuery,
    asked_about,
    check_answer,
    close_teacher,
    hard_rows,
    load_query,
    soft_rows,
)
from .teacher import (
    Normalize,
    Teacher,
    check_accuracy,
    create_normalize,
    has_batch_norm,
    has_fixed_size,
    least_teacher_accuracy,
    resize_mode,
    resized_to,
    to_memory_format,
)
from .weights import (
    ModelInfo,
    build_model,
    constructor_arguments,
    load_into,
    load_weights,
    look_up,
    teacher_facts,
    weights_digest,
    weights_file,
    weights_origin,
)

__all__ = [
    'asked_about', 'audit', 'build_model', 'check_accuracy', 'check_answer', 'check_kwargs', 'close_teacher',
    'ClosedTeacher', 'constructor_arguments', 'create_normalize', 'create_pair', 'create_student', 'create_teacher',
    'enable_distilled_training', 'FeatureMap', 'Features', 'find_classes', 'forward_with_features', 'hard_rows',
    'has_batch_norm', 'has_distillation_head', 'has_fixed_size', 'in_distilled_training', 'least_teacher_accuracy',
    'load_into', 'load_query', 'load_weights', 'look_at_features', 'look_up', 'MapPairs', 'match_classes', 'ModelInfo',
    'Normalize', 'outputs_of_heads', 'Pair', 'pair_maps', 'Queries', 'QueryError', 'QueryTeacher', 'read_class_map',
    'resize_mode', 'resized_to', 'simple_name', 'soft_rows', 'Taps', 'Teacher', 'teacher_facts', 'teacher_skeleton',
    'TeacherQuery', 'to_memory_format', 'weights_digest', 'weights_file', 'weights_origin', 'WithFeatures',
]  # fmt: skip
