"""For all tests: a run started in the background ignores Ctrl-C, and so would the programs it starts; heed it again."""

import signal
import threading

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
