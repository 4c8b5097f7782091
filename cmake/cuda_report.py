"""Reads what ptxas -v says from the standard input and prints a line a kernel, names made readable."""

import re
import subprocess
import sys

text = sys.stdin.read()
pattern = (
    r"entry function '(\S+)' for '(\S+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
)
rows = [m.groups() for m in re.finditer(pattern, text, re.DOTALL)]
if not rows:
    sys.exit(text + "\nno report of ptxas found")
names = subprocess.run(
    ["c++filt", *(row[0] for row in rows)], capture_output=True, text=True, check=True
).stdout.splitlines()
print(f"{'registers':>9} {'stack':>6} {'spilled':>8} {'static shared':>14}  kernel")
for name, (_, arch, stack, stores, loads, registers, shared) in sorted(zip(names, rows, strict=True)):
    kernel = re.sub(r"mmfast::mel::|\(anonymous namespace\)::|^void |\(.*$", "", name)
    print(f"{registers:>9} {stack:>6} {int(stores) + int(loads):>8} {shared or 0:>14}  {kernel} ({arch})")
