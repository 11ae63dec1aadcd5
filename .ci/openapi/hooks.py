"""What schemathesis has to be told to test the service as a real user would use it.

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
    """A user who may lose their session, their password and their account."""

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
# Signing out what is signed out already succeeds as well, so this one is never missed.
leaver = Guest()


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw["operationId"]
    if operation in SELF_ENDING and case.headers.get("Authorization") == RUNS_ON:
        case.headers["Authorization"] = (leaver if operation == "logout" else guest).authorization
    right = case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE
    if operation == "logout" and not right:
        # With a bearer token, a logout does not read what is wrong with its body.
        case.headers.pop("Authorization", None)
    if right and isinstance(case.body, dict):
        # Every other body stays wrong in what only the service can tell: the same ones whenever they
        # are sent again, or scenarios could not be replayed.
        truthful = zlib.crc32(json.dumps(case.body, sort_keys=True).encode()) % 4 > 0
        complete(operation, case.body, truthful)


def complete(operation, body, truthful):
    if operation == "register":
        body["password"] = strong(body["password"])
        email = unicodedata.normalize("NFC", body["email"].strip()).lower()
        if truthful or len(email.encode()) > 254 or any(ord(char) > 0xFFFF for char in email):
            # The first can be sent again; the second has more bytes than characters; of the third, some
            # are invisible, which a pattern for every JavaScript engine cannot say.
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
    elif operation in ("updateTask", "replaceTask") and not KNOWN_CHANGES & body.keys():
        # Members of other names are ignored, and a change of nothing is refused.
        body["completed"] = True


def strong(password):
    """The same password, as far as there is room for it, made hard to guess."""
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
        # Its session is over, or it has failed too often.
        guest = Guest()
    elif response.status_code == 429 and isinstance(case.body, dict) and case.body.get("email") == guest.email:
        # Its address was seen in an answer, and tried with other passwords.
        guest = Guest()


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Drops what is no fault of the service."""
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        # A right request can come with a key that another one used before.
        return response.json()["code"] != "idempotency_key_reused"
    # To clear the completed tasks is not to delete the list.
    return not (isinstance(failure, UseAfterFree) and failure.free.endswith("/tasks"))
