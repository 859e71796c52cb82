"""fetch.py URL TIMES: what Python's own HTTP client gets."""

import sys
from urllib.request import urlopen

url, times = sys.argv[1], int(sys.argv[2])
for _ in range(times):
    print(urlopen(url, timeout=5).read().decode())
