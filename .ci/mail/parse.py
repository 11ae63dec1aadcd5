"""Waits for a mail with an address and a subject in a maildir, checks it, and prints its token.

parse.py MAILDIR ADDRESS SUBJECT
"""

import email
import email.errors
import email.policy
import pathlib
import re
import sys
import time

NAME = "Tödö “Übersicht” 待办"
maildir, address, subject = sys.argv[1:]


def find():
    for path in pathlib.Path(maildir).glob("new/*"):
        # Read as text, because header fields with addresses beyond ASCII are in UTF-8 (RFC 6532).
        message = email.message_from_string(path.read_text("utf-8"), policy=email.policy.default)
        if message["To"].addresses[0].addr_spec == address and message["Subject"].endswith(subject):
            return message
    return None


deadline = time.monotonic() + 30
while (message := find()) is None:
    assert time.monotonic() < deadline, f"no mail to {address}"
    time.sleep(0.1)

assert not message.defects, message.defects
sender = message["From"].addresses[0]
assert (sender.display_name, sender.addr_spec) == (NAME, "todo@todo.example"), sender
assert message["Subject"] == f"{NAME}: {subject}"
assert message["Auto-Submitted"] == "auto-generated"
assert re.fullmatch(r"<[0-9a-f-]+@todo\.example>", message["Message-ID"].strip())
assert abs(message["Date"].datetime.timestamp() - time.time()) < 60
assert message.get_content_type() == "multipart/alternative"
for name, value in message.items():
    defects = [defect for defect in value.defects if not isinstance(defect, email.errors.NonASCIILocalPartDefect)]
    assert not defects, (name, defects)
text = message.get_body(["plain"]).get_content()
html = message.get_body(["html"]).get_content()
(link,) = re.findall(r"https://\S+", text)
assert NAME in text and NAME in html, text
assert f'href="{link}"' in html
# No tracking: nothing is loaded, and there is no other link.
assert "src=" not in html and html.count("http") == 1
prefix = "https://todo.example/account/reset#token="
assert link.startswith(prefix), link
print(link.removeprefix(prefix))
