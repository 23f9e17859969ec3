"""Devices beside the CPU: copies to and from one, its kernels and files overlap.

A lane (``lane``) sees bytes, matrices and schemes, never names or files; what is read and written,
and in which order, is the business of ``streamq.converting``. Nothing is imported here, because
the command line asks ``names`` alone.
"""
