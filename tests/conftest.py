"""Tests send Ctrl-C; a job that was started in the background ignores it, and so would every process that it starts."""
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
