"""What a block of a report means: for each finding a condition with its threshold, a sentence, and a command to try.

Of a block's rules the first whose condition holds speaks; the last holds always. A rule sees the facts that it needs,
by name, and is passed over where one of them is not known. Percentages and differences are in points of 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        block: of the report.
        name: of the finding.
        needs: facts that must be known.
        when: whether it holds, given the facts and the threshold.
        threshold: what the condition compares with; None where it has no number of its own.
        sentence, command: with facts in braces.
        tone: 'good', 'bad', or '' for neither.
    """

    block: str
    name: str
    needs: tuple[str, ...]
    when: Callable[[Facts, Any], bool]
    threshold: float | None
    sentence: str
    command: str
    tone: str = ''


@dataclass(frozen=True)
class Finding:
    """What a rule says of a run."""

    name: str
    sentence: str
    command: str
    tone: str


def always(_: Facts, __: Any) -> bool:
    """The condition of a block's last rule."""
    return True


RULES: tuple[Rule, ...] = (
    # ---- 1 verdict
    Rule(
        'verdict', 'teacher at chance', ('teacher_low',), lambda f, t: f['teacher_low'] <= t * f['chance'], 1.0,
        'The teacher is right on {teacher_top1:.1f} % of {images:,} images, which cannot be told from chance '
        '({chance:.1f} %): train it longer before anything else is read from this page.', '{better_teacher}', 'bad',
    ),
    Rule(
        'verdict', 'poisoned', ('poison',), always, None,
        "The teacher's logits were poisoned in this run, to study {distill} under attack: {poison}. Its "
        '{student_top1:.2f} % say what the attack does, not what the criterion does; the same run without attack says '
        'that.',
        '{train_clean}', 'bad',
    ),
    Rule(
        'verdict', 'few images', ('images', 'teacher_top1'), lambda f, t: 0 < f['images'] < t, 50,
        'With {images:,} validation images a difference of ten points may be chance: validate on more of them.',
        '{check_data}', 'bad',
    ),
    Rule(
        'verdict', 'gain', ('gain', 'gain_low'), lambda f, t: f['gain_low'] > t, 0.0,
        'Distilling gained {gain:+.2f} points over the run without it, more than these {images:,} images leave to '
        'chance (95% interval {gain_low:+.2f} to {gain_high:+.2f}); other seeds would show whether training does.',
        '{compare}', 'good',
    ),
    Rule(
        'verdict', 'loss', ('gain', 'gain_high'), lambda f, t: f['gain_high'] < t, 0.0,
        'Distilling cost {gain:+.2f} points beside the run without it (95% interval {gain_low:+.2f} to '
        '{gain_high:+.2f}): give the teacher less weight, or take another one.',
        '{train} {half_weight} --experiment {name}-half', 'bad',
    ),
    Rule(
        'verdict', 'chance', ('gain', 'gain_low'), always, None,
        'The difference to the run without distillation, {gain:+.2f} points, lies inside its 95% interval '
        '({gain_low:+.2f} to {gain_high:+.2f}): it may be chance, and several seeds would tell.',
        '{compare}',
    ),
    Rule(
        'verdict', 'ahead', ('ahead_low', 'train_none'), lambda f, t: f['ahead_low'] > t, 0.0,
        'The student is {ahead:.2f} points better than its teacher (95% interval {ahead_low:.2f} to '
        '{ahead_high:.2f}): a teacher that is trained longer, or a larger one, has more to teach.',
        '{better_teacher}',
    ),
    Rule(
        'verdict', 'as good', ('behind_low', 'train_none'), lambda f, t: f['behind_low'] <= t, 0.0,
        'The student cannot be told from its teacher on these {images:,} images ({ahead:+.2f} points, 95% interval '
        '{ahead_low:+.2f} to {ahead_high:+.2f}); whether it owes that to distilling, only a run without it can say.',
        '{train_none}', 'good',
    ),
    Rule(
        'verdict', 'behind', ('behind_low', 'train_none'), always, None,
        'The student is {behind:.2f} points behind its teacher (95% interval {behind_low:.2f} to {behind_high:.2f}); '
        'whether distilling was worth it, only a run without it can say (then: report --baseline).',
        '{train_none}',
    ),
    Rule(
        'verdict', 'unmeasured', ('teacher_top1', 'train_none'), always, None,
        'The student is {behind:.2f} points behind its teacher; a run without distillation would say whether it was '
        'worth it.', '{train_none}',
    ),
    Rule('verdict', 'alone', (), always, None,
         'This run has no teacher: it is what a distilled student is to be compared with.', '{report_baseline}'),
    # ---- 2 right and wrong
    Rule(
        'answers', 'labels', ('suspects', 'neither'),
        lambda f, t: f['suspects'] >= max(3, t * f['images'] / 100) and f['suspects'] > f['neither'] / 4, 1.0,
        'For {suspects:,} images ({suspects_share:.1f} %) both networks confidently name the same class, and it is not '
        'the label: look at these labels before anything else.', 'head -n 31 {suspects_file}', 'bad',
    ),
    Rule(
        'answers', 'teacher knows more', ('only_teacher',),
        lambda f, t: f['only_teacher'] > 2 * f['only_student'] and f['only_teacher'] > t * f['images'] / 100, 4.0,
        'The teacher is right and the student wrong on {only_teacher:,} images, the reverse holds for '
        '{only_student:,}: there is more to learn from this teacher, with a longer training or a larger student.',
        '{train} --epochs {twice_epochs} --experiment {name}-longer',
    ),
    Rule(
        'answers', 'student corrects', ('only_teacher',), lambda f, t: f['only_student'] >= t * f['only_teacher'], 0.5,
        'The student is right on {only_student:,} images on which its teacher is wrong, the reverse holds for '
        '{only_teacher:,}: refined logits claim their gain here, and kd beside rld would show it.',
        '{compare_kd}', 'good',
    ),
    Rule(
        'answers', 'alike', ('only_teacher',), always, None,
        'Both networks are wrong on {neither:,} images, and the teacher alone is right on {only_teacher:,} more: a '
        'better teacher helps more than a longer training.', "timm-rld list models '{teacher_family}'",
    ),
    Rule(
        'answers', 'alone', (), always, None,
        'The student is wrong on {wrong:,} of {images:,} images; with a teacher this block shows whose fault that is.',
        'head -n 31 {suspects_file}',
    ),
    # ---- 3 curves
    Rule(
        'curves', 'few epochs', ('epochs',), lambda f, t: f['epochs'] < t, 5,
        'With {epochs} epoch(s) the curves say little: train longer.',
        '{train} --epochs {twice_epochs} --experiment {name}-longer',
    ),
    Rule(
        'curves', 'past its best', ('best_lead',), lambda f, t: f['best_lead'] > t, 1.0,
        'Epoch {best_epoch} was {best_lead:.2f} points better than the last one: take its weights, or train for fewer '
        'epochs.', 'timm-rld push {run} --hub-weights best', 'bad',
    ),
    Rule(
        'curves', 'rising', ('top1_rise',), lambda f, t: f['top1_rise'] > t, 0.75,
        'Top-1 still rises ({top1_rise:+.2f} points in the last tenth of the epochs): train longer.',
        '{train} --epochs {twice_epochs} --experiment {name}-longer',
    ),
    Rule(
        'curves', 'gap', ('loss_gap',), lambda f, t: f['loss_gap'] > t, 0.3,
        'The validation loss is {loss_gap:.2f} above that of training: more augmentation, or more images.',
        "{train} --aa rand-m9-mstd0.5 --reprob 0.25 --experiment {name}-augmented",
    ),
    Rule(
        'curves', 'capacity', ('agreement', 'agreement_rise'),
        lambda f, t: f['agreement'] < t and f['agreement_rise'] < 0.5, 85.0,
        'Agreement with the teacher stays at {agreement:.1f} % ({agreement_rise:+.2f} points in the last fifth of the '
        'epochs): a student of more capacity could follow it further.', "timm-rld list models '{student_family}'",
    ),
    Rule(
        'curves', 'settled', (), always, None,
        'The curves have settled, and training and validation agree: what other seeds give is the next question.',
        '{compare}', 'good',
    ),
    # ---- 4 classes
    Rule(
        'classes', 'few images', ('median_count',), lambda f, t: f['median_count'] < t, 5,
        'Half of the classes have {median_count} validation images or fewer: what is said of single classes may be '
        'chance.', '{check_data}',
    ),
    Rule(
        'classes', 'rare', ('worst_train_share', 'worst_top1'),
        lambda f, t: f['worst_train_share'] < t and f['worst_top1'] < f['student_top1'] - 10, 0.5,
        '“{worst_class}” is the class that suffers most ({worst_top1:.1f} %), and it has {worst_train:,} training '
        'images where others have {median_train:,}: more images of it help more than any setting.',
        '{check_data}', 'bad',
    ),
    Rule(
        'classes', 'pair', ('pair_share',), lambda f, t: f['pair_share'] >= t, 20.0,
        '“{pair_true}” is called “{pair_said}” in {pair_share:.0f} % of its images: look whether the two can be told '
        'apart at this size, and whether their labels are right.',
        '{train} --img-size {larger} --experiment {name}-{larger}',
    ),
    Rule(
        'classes', 'behind', ('worst_gap', 'worst_gap_class'), lambda f, t: f['worst_gap'] <= t, -10.0,
        'The student loses most to its teacher on “{worst_gap_class}” ({worst_gap:+.1f} points): a criterion that '
        'weighs the classes otherwise may keep it.', '{compare_dkd}',
    ),
    Rule(
        'classes', 'even', (), always, None,
        'No class stands out: other seeds would show whether that stays so.', '{compare}', 'good',
    ),
    # ---- 5 calibration
    Rule(
        'calibration', 'few images', ('images',), lambda f, t: 0 < f['images'] < t, 50,
        'With {images:,} validation images it cannot be told how sure the networks should be.', '{check_data}',
    ),
    Rule(
        'calibration', 'teacher says nothing', ('teacher_best_temperature',),
        lambda f, t: f['teacher_best_temperature'] > t, 50,
        "The teacher's loss is lowest where it names no class at all (temperature {teacher_best_temperature:.0f}): it "
        'has learned next to nothing about these images, so train it longer.', '{better_teacher}', 'bad',
    ),
    Rule(
        'calibration', 'teacher too sure', ('teacher_best_temperature', 'temperature'),
        lambda f, t: f['teacher_best_temperature'] > t, 1.5,
        'The teacher is surer than it is right (its loss is lowest at temperature {teacher_best_temperature:.2f}): '
        'distil at a higher temperature.',
        '{train} --distill-kwargs {options_with_temperature} --experiment {name}-t{new_temperature:g}',
    ),
    Rule(
        'calibration', 'teacher too doubtful', ('teacher_best_temperature', 'temperature'),
        lambda f, t: f['teacher_best_temperature'] < t, 0.67,
        'The teacher is less sure than it is right (its loss is lowest at temperature {teacher_best_temperature:.2f}): '
        'distil at a lower temperature.',
        '{train} --distill-kwargs {options_with_temperature} --experiment {name}-t{new_temperature:g}',
    ),
    Rule(
        'calibration', 'student too doubtful', ('student_ece', 'student_bias', 'smoothing'),
        lambda f, t: f['student_ece'] > t and f['student_bias'] < 0 and f['smoothing'] > 0, 5.0,
        'The student is right more often than it says (calibration error {student_ece:.1f} points); label smoothing '
        'is one cause of that.', '{train} --smoothing 0 --experiment {name}-sharp',
    ),
    Rule(
        'calibration', 'student off', ('student_ece',), lambda f, t: f['student_ece'] > t, 5.0,
        'What the student says and how often it is right differ by {student_ece:.1f} points on average: divide its '
        'logits by its best temperature before using its probabilities.', 'timm-rld evaluate {run}',
    ),
    Rule(
        'calibration', 'fine', ('use',), always, None,
        "The student's probabilities can be taken as they are (calibration error {student_ece:.1f} points).",
        '{use}', 'good',
    ),
    Rule(
        'calibration', 'fine, no folder', (), always, None,
        "The student's probabilities can be taken as they are (calibration error {student_ece:.1f} points).",
        'timm-rld evaluate {run}', 'good',
    ),
    # ---- generated images
    Rule(
        'generated', 'collapsed', ('collapsed',), lambda f, t: bool(f['collapsed']), None,
        '{collapsed}.', '{another_generator}', 'bad',
    ),
    Rule(
        'generated', 'far apart', ('generated_agreement',), lambda f, t: f['generated_agreement'] < t, 80.0,
        'On generated images the student names the class of its teacher in {generated_agreement:.1f} % only: it has '
        'not learned yet what it is shown, and more steps help.',
        '{train} --steps-per-epoch {more_steps} --experiment {name}-longer',
    ),
    Rule(
        'generated', 'real images differ', ('ahead', 'generated_agreement'), lambda f, t: f['ahead'] <= t, -10.0,
        'The student follows its teacher on generated images ({generated_agreement:.1f} %), but is {behind:.1f} points '
        'behind it on real ones, which the generated ones are not like: another generator, of more images or epochs, '
        'may be.', '{another_generator}',
    ),
    Rule(
        'generated', 'fine', (), always, None,
        'The generated images are of {generated_classes} classes, and the student follows its teacher on them '
        '({generated_agreement:.1f} %): what another generator gives is the next question.', '{another_generator}',
        'good',
    ),
    # ---- 6 what the networks saw
    Rule(
        'images', 'normalisation', ('worst_mean', 'worst_std'),
        lambda f, t: abs(f['worst_mean']) > t or not 0.4 < f['worst_std'] < 2.5, 1.0,
        'After normalisation a channel of these images has mean {worst_mean:.2f} and deviation {worst_std:.2f}, far '
        'from 0 and 1: the normalisation does not fit the data.',
        '{train} --mean {data_mean} --std {data_std} --experiment {name}-normalised', 'bad',
    ),
    Rule(
        'images', 'too strong', ('teacher_wrong_seen',), lambda f, t: f['teacher_wrong_seen'] > t, 50.0,
        'The teacher is wrong on {teacher_wrong_seen:.0f} % of these augmented images: they are cut or coloured too '
        'much for it to teach anything.', '{train} {gentler} --experiment {name}-gentle', 'bad',
    ),
    Rule(
        'images', 'plain', ('no_aug',), lambda f, t: f['no_aug'], None,
        'The images are not augmented, so that each epoch shows the same ones.',
        '{with_augmentation}',
    ),
    Rule(
        'images', 'fine', (), always, None,
        'Values are well normalised; whether crops still show their class, only a look can tell. Gentler crops are '
        'one flag away.', '{train} {gentler} --experiment {name}-gentle', 'good',
    ),
    # ---- 7 where the time went
    Rule(
        'time', 'data', ('share_data',), lambda f, t: f['share_data'] > t, 20.0,
        'The networks waited for images for {share_data:.0f} % of the time: more loader workers, or JPEGs decoded at '
        'a smaller scale.', '{train} --workers auto --jpeg-draft --experiment {name}-faster', 'bad',
    ),
    Rule(
        'time', 'teacher', ('share_teacher', 'can_cache'),
        lambda f, t: f['can_cache'] and f['share_teacher'] > t, 15.0,
        'The teacher took {share_teacher:.0f} % of the time; with its logits cached, the next run with this data and '
        'teacher spares most of that.', '{train} --teacher-cache {run}-cache --experiment {name}-cached',
    ),
    Rule(
        'time', 'student', ('share_student',), always, None,
        'The student itself took {share_student:.0f} % of the time: only a faster step can save more.', '{bench}',
        'good',
    ),
    Rule('time', 'unknown', (), always, None, 'This run did not write where its time went.', '{bench}'),
    # ---- 8 command and settings
    Rule(
        'settings', 'again', (), always, None,
        'The same settings on the same data give this run again, bit for bit on the same machine and number of '
        'processes.', '{again}',
    ),
    # ---- a comparison
    Rule(
        'comparison', 'one seed', ('seeds',), lambda f, t: f['seeds'] < t, 2,
        'With one seed nobody can tell a difference from chance: add seeds; the runs that are there are kept.',
        '{more_seeds}', 'bad',
    ),
    Rule(
        'comparison', 'better', ('gain', 'gain_half'), lambda f, t: f['gain'] - f['gain_half'] > t, 0.0,
        '{reference} is {gain:+.2f} points better than {second} on the same seeds (95% interval ± {gain_half:.2f}), '
        'and that is beyond chance.', '{push}', 'good',
    ),
    Rule(
        'comparison', 'worse', ('gain', 'gain_half'), lambda f, t: f['gain'] + f['gain_half'] < t, 0.0,
        '{reference} differs from {second} by {gain:+.2f} points on the same seeds (95% interval ± {gain_half:.2f}): '
        'it is worse here, beyond chance.', '{push}', 'bad',
    ),
    Rule(
        'comparison', 'chance', ('gain', 'gain_half'), always, None,
        '{reference} and {second} differ by {gain:+.2f} ± {gain_half:.2f} points on the same seeds: that may be '
        'chance, and more seeds narrow the interval.', '{more_seeds}',
    ),
    Rule('comparison', 'incomplete', (), always, None,
         'Too few runs have finished to compare anything.', '{more_seeds}'),
    # ---- a comparison under attack
    Rule(
        'attacks', 'damage', ('most_loss',), lambda f, t: f['most_loss'] > t, 1.0,
        '{most_criterion} lost most, {most_loss:.1f} points under {most_attack} at fraction {most_fraction:g}; '
        '{least_criterion} lost least at its worst, {least_loss:.1f} under {least_attack}.', '{more_seeds}', 'bad',
    ),
    Rule('attacks', 'harmless', ('most_loss',), always, None,
         'No criterion lost more than a point: try a larger fraction or another attack.', '{more_seeds}'),
    Rule('attacks', 'no clean runs', (), always, None,
         'Without clean runs (--poison-fraction 0) nobody can say what an attack cost.', '{more_seeds}'),
)  # fmt: skip


def finding(block: str, facts: Facts) -> Finding:
    """Return what a block means, by the first of its rules that holds."""
    for rule in RULES:
        if rule.block != block or any(facts.get(name) is None for name in rule.needs):
            continue
        if rule.when(facts, rule.threshold):
            return Finding(rule.name, rule.sentence.format(**facts), rule.command.format(**facts), rule.tone)
    raise LookupError(f'no rule holds for the block {block}')
