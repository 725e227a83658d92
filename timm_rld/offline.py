"""Is the Hugging Face Hub in reach?"""

from __future__ import annotations

import functools
import ssl
import threading
import urllib.error
import urllib.request

PROBE_SECONDS = 3.0


@functools.cache
def hub_in_reach() -> bool:
    """Return whether the Hub answers, asked once per process for at most 3 s; if not, switch its client to offline
    mode.

    Offline, whatever is in the local cache still loads, and whatever is not fails at once, rather than after the
    client's 45 s of retries.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:  # in a thread: a look-up of the host's name knows no timeout
        try:
            urllib.request.urlopen(
                urllib.request.Request(constants.ENDPOINT, method='HEAD'), timeout=PROBE_SECONDS
            ).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except urllib.error.URLError as e:
            if isinstance(e.reason, ssl.SSLError):  # it answers; the Hub's client has certificates of its own
                answered.set()
        except Exception:
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answered.is_set():
        constants.HF_HUB_OFFLINE = True
        try:
            import datasets

            datasets.config.HF_HUB_OFFLINE = True
        except ImportError:
            pass
    return answered.is_set()
