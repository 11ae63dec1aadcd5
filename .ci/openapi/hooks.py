"""Schemathesis hooks, so that the service is tested as a real user would use it.

Before a request is sent:

- what would end the session or the account that the whole run lives on gets a user of its own;
- a body that is meant to be right gets what a schema cannot say (a password that is hard to guess
  or is really the account's, a refresh token that was really issued).
"""

import json
import os
import secrets
import unicodedata
import urllib.request
import zlib

import schemathesis
from schemathesis import GenerationMode
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree

BASE_URL = os.environ["BASE_URL"]
RUNS_ON = f"Bearer {os.environ['ACCESS_TOKEN']}"
PASSWORD = "blue kettle sings at dawn"
KNOWN_CHANGES = {"title", "description", "completed"}
SELF_ENDING = {"logout", "deleteMe", "changePassword", "endSession", "endOtherSessions"}


class Guest:
    """A user whose session, password and account the tests may change or delete."""

    def __init__(self):
        self.email = f"guest-{secrets.token_hex(8)}@example.com"
        self.password = PASSWORD
        request = urllib.request.Request(
            f"{BASE_URL}/api/v1/auth/register",
            json.dumps({"email": self.email, "password": PASSWORD}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            self.take(json.load(answer))

    def take(self, tokens):
        self.authorization = f"Bearer {tokens['access_token']}"
        self.refresh_token = tokens["refresh_token"]


guest = Guest()
# A second logout succeeds too, so no test depends on this session.
leaver = Guest()


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw["operationId"]
    if operation in SELF_ENDING and case.headers.get("Authorization") == RUNS_ON:
        case.headers["Authorization"] = (leaver if operation == "logout" else guest).authorization
    right = case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE
    if operation == "logout" and not right:
        # A logout with a bearer token does not read its body, valid or not.
        case.headers.pop("Authorization", None)
    if right and isinstance(case.body, dict):
        # Every other body stays invalid in a way that only the service detects. The choice depends on the
        # body alone, so that scenarios can be replayed.
        truthful = zlib.crc32(json.dumps(case.body, sort_keys=True).encode()) % 4 > 0
        complete(operation, case.body, truthful)


def complete(operation, body, truthful):
    if operation == "register":
        body["password"] = strong(body["password"])
        email = unicodedata.normalize("NFC", body["email"].strip()).lower()
        if truthful or len(email.encode()) > 254 or any(ord(char) > 0xFFFF for char in email):
            # The first can be sent again, the second has more bytes than characters, and the third contains
            # invisible characters, which no pattern for all JavaScript engines can exclude.
            body["email"] = f"{secrets.token_hex(8)}@example.com"
    elif operation == "changePassword":
        body["new_password"] = strong(body["new_password"])
        if truthful:
            body["current_password"] = guest.password
    elif operation == "deleteMe" and truthful:
        body["password"] = guest.password
    elif operation == "login" and truthful:
        body.update(email=guest.email, password=guest.password)
    elif operation in ("refresh", "logout") and truthful:
        body["refresh_token"] = (leaver if operation == "logout" else guest).refresh_token
    elif operation in ("updateTask", "updateTaskWithPut") and not KNOWN_CHANGES & body.keys():
        # Unknown members are ignored, and a change without known members is refused.
        body["completed"] = True


def strong(password):
    """Makes a password hard to guess, keeping as much of it as fits."""
    kept = password.encode()[:40].decode(errors="ignore")
    return f"{kept} {secrets.token_hex(12)}"


@schemathesis.hook
def after_call(context, case, response):
    global guest
    operation = case.operation.definition.raw["operationId"]
    if response.status_code == 200 and operation in ("login", "refresh", "changePassword"):
        tokens = response.json()
        if tokens["user"]["email"] == guest.email:
            guest.take(tokens)
            if operation == "changePassword":
                guest.password = case.body["new_password"]
    elif operation == "deleteMe" and response.status_code == 204:
        guest = Guest()
    elif response.status_code in (401, 429) and case.headers.get("Authorization") == guest.authorization:
        # The session has ended, or the account is locked.
        guest = Guest()
    elif response.status_code == 429 and isinstance(case.body, dict) and case.body.get("email") == guest.email:
        # The address appeared in a response and was tried with other passwords.
        guest = Guest()


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Drops failures that the service does not cause."""
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        # A valid request can repeat an Idempotency-Key of an earlier one.
        return response.json()["code"] != "idempotency_key_reused"
    # Deleting the completed tasks does not delete the list.
    return not (isinstance(failure, UseAfterFree) and failure.free.endswith("/tasks"))
