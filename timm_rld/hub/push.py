"""A finished run to the Hub: the model as a timm folder, its card, and the files that describe how it was trained."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import Stopped, UserError, writing
from ..offline import hub_in_reach
from ..run_folder import RunFiles, read_exports, read_run
from .card import (
    card_header,
    card_section,
    chosen_metrics,
    curve_png,
    merge_card,
    public_command,
    public_settings,
)

T = TypeVar('T')
WEIGHTS = ('last', 'best', 'ema')
RETRY_SECONDS = (1, 2, 4, 8, 16)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def check_hub(hub_model_id: str, private: bool = False, license: str | None = None) -> str:
    """Before any work: a token is there and valid, it may write to the namespace, and the repository exists or is made.

    Args:
        hub_model_id: `user/name`, or `name` for the token's own user.
        private: whether a new repository is private.
        license: of the card; None: not asked about.

    Returns:
        `user/name`.

    Raises:
        UserError: what is missing, and how to fix it.
    """
    from huggingface_hub import HfApi, ModelCard, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, flag = hub_model_id, f'--hub-model-id {hub_model_id}'
    if get_token() is None:
        raise UserError('push: no token; set HF_TOKEN, or log in with `hf auth login`')
    if not hub_in_reach():
        raise UserError('push: cannot reach the Hub; check the network and HF_HUB_OFFLINE')
    api = HfApi()
    user = _retried(api.whoami, 'push')
    name = user['name']
    if (user.get('auth') or {}).get('accessToken', {}).get('role') == 'read':
        raise UserError(f'push: the token of {name} may only read; make one that may write')
    if '/' not in repo_id:
        repo_id = f'{name}/{repo_id}'
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise UserError(f'{flag}: not a name of a repository ({str(e).splitlines()[0]})') from e
    namespace = repo_id.partition('/')[0]
    writable = [name, *(org['name'] for org in user.get('orgs') or () if org.get('roleInOrg') != 'read')]
    if namespace not in writable:
        raise UserError(f'{flag}: the token of {name} may not write to {namespace}; it may to {", ".join(writable)}')
    if license is not None:
        _retried(ModelCard(f'---\nlicense: {license}\n---\n').validate, f'--hub-license {license}')
    _retried(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), flag)
    _retried(lambda: api.auth_check(repo_id, write=True), flag)
    return repo_id


def push_run(
    folder: str | Path,
    hub_model_id: str,
    *,
    hub_private_repo: bool = False,
    hub_license: str | None = None,
    hub_weights: str = 'last',
    after: BackgroundPush | None = None,
    log: Callable[[str], None] = print,
) -> str:
    """Push a finished run: model.safetensors, config.json, the card, its curve, results.json, args.yaml, summary.csv,
    and exports (`timm-rld export`) that lie in it.

    In the pushed copies local paths are cut to their last component. A card that is there keeps what a person wrote:
    only the part between our marks, and the figures in its header, are renewed.

    Args:
        folder: of the run.
        hub_model_id: `user/name`, or `name` for the token's own user.
        hub_private_repo: whether a new repository is private.
        hub_license: for the card's header; None: the card's own, of a new one that of the weights which the student
            started from, else apache-2.0.
        hub_weights: `last`, `best` (on the validation split; from its checkpoint) or `ema`.
        after: pushes that must be done before.
        log: prints a line.

    Returns:
        The model's page.

    Raises:
        UserError: as :func:`check_hub`; weights that the run does not have; a push that failed after all tries.
    """
    run = read_run(folder)
    if run.settings.get('tune_holdout') is not None:
        raise UserError(
            f'push: {folder} is a run of a search, with --tune-holdout: it has no validation accuracy; push a run in '
            'final/ of the search'
        )
    file = find_weights(run, hub_weights)
    if after is not None:
        after.wait()
    words = ['timm-rld', 'push', str(run.folder), '--hub-model-id', hub_model_id, '--hub-weights', hub_weights]
    words += [] if hub_license is None else ['--hub-license', hub_license]
    words += ['--hub-private-repo'] if hub_private_repo else []
    try:
        repo_id = check_hub(hub_model_id, hub_private_repo, hub_license)
        return _push(run, file, repo_id, hub_license, hub_weights, log)
    except KeyboardInterrupt:
        raise Stopped(f'interrupted. The run is complete in {run.folder}; again: {shlex.join(words)}', 130) from None
    except UserError as e:
        raise UserError(f'{e}.\nThe run is complete in {run.folder}; again: {shlex.join(words)}') from e


def _push(
    run: RunFiles, file: Path, repo_id: str, license: str | None, weights: str, log: Callable[[str], None]
) -> str:
    """Push weights from a file, and all that goes with them, as one commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    flag = 'push'
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with writing('push: the temporary folder (TMPDIR)'), tempfile.TemporaryDirectory() as temporary:
        files = Path(temporary)
        existing = _retried(lambda: _read_card(api, repo_id, files), flag)
        write_files(run, file, files, repo_id, license, weights, existing)
        metrics = chosen_metrics(run, weights)
        message = f'{weights} weights, epoch {metrics["epoch"]:.0f}, top-1 {metrics["top1"]:.2f}'
        _retried(lambda: api.upload_folder(repo_id=repo_id, folder_path=files, commit_message=message), flag)
    url = f'{api.endpoint}/{repo_id}'
    log(f"pushed to {url} ({message}): timm.create_model('hf-hub:{repo_id}', pretrained=True)")
    return url


class BackgroundPush:
    """Pushes checkpoints that end an epoch while training continues; where the network is slower, the newest one waits.
    (`HfApi.run_as_future` would keep the process alive, after a signal too, until its push has ended.)

    Args:
        run: folder of the run, with args.yaml and summary.csv.
        results: of results.json, as far as they are known.
        student, export: the network, and what writes it into a folder, for its config.json.
        log: prints a line.
        hub_strategy: `best`, `every_save`, or `end`: then there is nothing to do here.
        Others: as in :func:`push_run`; the repository has been checked.
    """

    def __init__(
        self, run: Path, results: dict[str, Any], student: Any, export: Callable[..., Path], log: Callable[[str], None],
        *, hub_strategy: str, hub_model_id: str, hub_license: str | None, hub_weights: str,
    ) -> None:  # fmt: skip
        self.run, self.repo_id, self.results = run, hub_model_id, results
        self.strategy, self.license, self.log = hub_strategy, hub_license, log
        self.weights = 'ema' if hub_weights == 'ema' else 'last'
        self.temporary = tempfile.mkdtemp(prefix='timm_rld-push-')
        weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)  # at the latest when Python ends
        self.config = export(student, Path(self.temporary) / 'student') / 'config.json'
        self.settings = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
        self.waiting: tuple[RunFiles, Path] | None = None
        self.pushing = False
        self.busy = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, checkpoint: Path, history: list[dict[str, float]], outcome: dict[str, Any]) -> None:
        """Push a checkpoint that has just been written; returns at once."""
        best = outcome['best_epoch'] == history[-1]['epoch']
        if history[-1]['epoch'] == self.settings['epochs']:
            return  # the end pushes it
        if self.strategy == 'end' or (self.strategy == 'best' and not best):
            return
        try:
            file = Path(tempfile.mkdtemp(dir=self.temporary)) / 'model.safetensors'
            shutil.copyfile(checkpoint / ('ema.safetensors' if self.weights == 'ema' else 'model.safetensors'), file)
        except OSError as e:  # a full temporary folder must not stop the training
            self.log(f'note: epoch {history[-1]["epoch"]:.0f} is not pushed ({e.strerror})')
            return
        run = RunFiles(
            self.run, self.settings, {**self.results, **outcome}, [dict(row) for row in history], self.config
        )
        with self.busy:
            if self.waiting:
                shutil.rmtree(self.waiting[1].parent)
            self.waiting = run, file
            self.busy.notify_all()

    def _work(self) -> None:
        while True:
            with self.busy:
                while not self.waiting:
                    self.busy.wait()
                (run, file), self.waiting, self.pushing = self.waiting, None, True
            try:
                _push(run, file, self.repo_id, self.license, self.weights, self.log)
            except Exception as e:
                why = (str(e) or type(e).__name__).splitlines()[0]
                self.log(f'note: epoch {run.history[-1]["epoch"]:.0f} was not pushed ({why})')
            finally:
                shutil.rmtree(file.parent, ignore_errors=True)
                with self.busy:
                    self.pushing = False
                    self.busy.notify_all()

    def wait(self) -> None:
        """Wait until nothing is left to push, at most ten minutes."""
        with self.busy:
            if self.waiting or self.pushing:
                self.log('waiting for the push of an earlier epoch')
            if not self.busy.wait_for(lambda: not self.waiting and not self.pushing, timeout=600):
                self.log('note: the push of an earlier epoch has not ended; continuing without it')


def find_weights(run: RunFiles, weights: str, flag: str = '--hub-weights') -> Path:
    """Return the safetensors file of some weights of a run.

    Raises:
        UserError: where the run does not have them; it names ``flag``.
    """
    folder = run.folder / ('student_ema' if weights == 'ema' else 'student')
    file = folder / 'model.safetensors'
    if weights == 'best' and run.results['best_epoch'] != run.history[-1]['epoch']:
        exported = run.results.get('student_folders', {}).get('student_best', {}).get('epoch')
        if exported == run.results['best_epoch']:
            file = run.folder / 'student_best' / 'model.safetensors'
        else:  # of a version that did not write it, or while the run lasts
            checkpoint = f'student-epoch{run.results["best_epoch"]:04.0f}-end'
            file = run.folder / 'checkpoints' / checkpoint / 'model.safetensors'
    if not file.is_file():
        why = {'ema': 'the run had no --model-ema', 'best': f'{file.parent} is gone'}.get(weights, f'no {file}')
        raise UserError(f'{flag} {weights}: {why}; {flag} last is there')
    return file


def write_files(
    run: RunFiles, weights_file: Path, folder: Path, repo_id: str, license: str | None, weights: str,
    existing_card: str | None,
) -> None:  # fmt: skip
    """Write what is pushed into a folder; arguments as :func:`push_run`."""
    shutil.copyfile(run.config, folder / 'config.json')
    shutil.copyfile(weights_file, folder / 'model.safetensors')
    for file in (file for export in read_exports(run.folder) for file in export.beside):
        shutil.copyfile(file, folder / file.name)
    results = {**run.results, 'command': public_command(run.results['command'])}
    for key in ('teacher', 'student'):
        if results.get(key):
            results[key] = public_settings({key: results[key]})[key]
    texts = {
        'results.json': json.dumps(results, indent=2, ensure_ascii=False),
        'args.yaml': yaml.safe_dump(public_settings(run.settings), sort_keys=False, allow_unicode=True),
        'summary.csv': (run.folder / 'summary.csv').read_text(encoding='utf-8'),
    }
    curve = curve_png(run.history)
    if curve is not None:
        (folder / 'curve.png').write_bytes(curve)
    section = card_section(run, repo_id, weights, curve is not None)
    texts['README.md'] = merge_card(
        existing_card, card_header(run, repo_id, license, weights), section, license is not None
    )
    for name, text in texts.items():
        (folder / name).write_text(text, encoding='utf-8', errors='backslashreplace')


def _read_card(api: Any, repo_id: str, folder: Path) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, 'README.md', local_dir=folder / '.card', force_download=True)
        return Path(path).read_text(encoding='utf-8')
    except EntryNotFoundError:
        return None
    except UnicodeDecodeError as e:
        raise UserError('push: the card on the Hub is not UTF-8 text; fix or delete README.md there') from e
    finally:
        shutil.rmtree(folder / '.card', ignore_errors=True)


def _retried(function: Callable[[], T], flag: str) -> T:
    """Call the Hub, again after a while where the failure may pass: a busy or restarting server, a lost connection.

    Raises:
        UserError: with the Hub's answer.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return function()
        except UserError:
            raise
        except Exception as e:
            status, retry_after, lost = _what_happened(e)
            if wait is not None and (status in _TRANSIENT or lost):
                time.sleep(max(wait, min(retry_after, 60)))
                continue
            if lost:
                why = f'the connection failed ({type(e).__name__})'
            elif status:
                why = {
                    401: 'the token is not valid; set HF_TOKEN to another, or log in again with `hf auth login`',
                    403: 'the token may not write there; give it write access, or name another --hub-model-id',
                }.get(status, f'the Hub answered {status}')
            else:
                why = (str(e) or type(e).__name__).strip().splitlines()[0]
            raise UserError(f'{flag}: {why}') from e
    raise AssertionError('unreachable')


def _what_happened(error: BaseException) -> tuple[int, int, bool]:
    """Return the Hub's status (0: none), the seconds it asks to wait, and whether the connection was lost. The client
    wraps errors into others, and its HTTP library has another name from version to version."""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, 'response', None)
        if response is not None and getattr(response, 'status_code', None):
            asked = response.headers.get('Retry-After', '')
            return response.status_code, int(asked) if asked.isdigit() else 0, False
        library = type(link).__module__.partition('.')[0]
        if isinstance(link, (ConnectionError, TimeoutError)) or library in ('httpx', 'httpx2', 'requests', 'urllib3'):
            return 0, 0, True
        link = link.__cause__ or link.__context__
    return 0, 0, False
