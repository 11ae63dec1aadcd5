"""Schemathesis hooks that make generated requests realistic.

Before a request is sent:

- a request that would end the session or the account of the whole run is sent as another user;
- a valid body gets values that a schema cannot describe: a password that is hard to guess, the
  account's current password, a refresh token or cursor that the service issued, or the ID of a new task.
"""

import json
import os
import secrets
import time
import unicodedata
import urllib.request
import zlib

import schemathesis
from schemathesis import GenerationMode
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree

BASE_URL = os.environ["BASE_URL"]
MAIN_AUTHORIZATION = f"Bearer {os.environ['ACCESS_TOKEN']}"
PASSWORD = "blue kettle sings at dawn"
TASK_FIELDS = {"title", "description", "completed"}
SESSION_ENDING = {"logout", "deleteMe", "changePassword", "endSession", "endOtherSessions"}


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
        with urllib.request.urlopen(request) as response:
            self.update(json.load(response))

    def update(self, tokens):
        self.authorization = f"Bearer {tokens['access_token']}"
        self.refresh_token = tokens["refresh_token"]


guest = Guest()
# Only logs out. No test depends on this session, because a second logout succeeds as well.
logout_guest = Guest()


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw["operationId"]
    if operation in SESSION_ENDING and case.headers.get("Authorization") == MAIN_AUTHORIZATION:
        case.headers["Authorization"] = (logout_guest if operation == "logout" else guest).authorization
    is_valid = case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE
    if operation == "logout" and not is_valid:
        # A logout with a bearer token does not read its body, valid or not.
        case.headers.pop("Authorization", None)
    if is_valid and operation == "listChanges" and case.query.get("since"):
        # Only the service can write a cursor.
        case.query["since"] = ""
    if is_valid and operation == "updateTaskWithPut" and case.headers.get("If-None-Match") == "*":
        case.path_parameters["id"] = new_id()
        case.body.setdefault("title", "A title")
    if is_valid and isinstance(case.body, dict):
        # A quarter of the bodies keep values that only the service can reject. The choice depends only on
        # the body, so that scenarios can be replayed.
        use_real_values = zlib.crc32(json.dumps(case.body, sort_keys=True).encode()) % 4 > 0
        insert_real_values(operation, case.body, use_real_values)


def insert_real_values(operation, body, use_real_values):
    if operation in ("register", "changeEmail"):
        if operation == "register":
            body["password"] = strengthen(body["password"])
        email = unicodedata.normalize("NFC", body["email"].strip()).lower()
        if use_real_values or len(email.encode()) > 254 or any(ord(char) > 0xFFFF for char in email):
            # The schema limits the length in characters, not bytes, and cannot exclude invisible characters
            # in a pattern that all JavaScript engines support.
            body["email"] = f"{secrets.token_hex(8)}@example.com"
    elif operation == "changePassword":
        body["new_password"] = strengthen(body["new_password"])
        if use_real_values:
            body["current_password"] = guest.password
    elif operation == "resetPassword":
        body["new_password"] = strengthen(body["new_password"])
    elif operation == "deleteMe" and use_real_values:
        body["password"] = guest.password
    elif operation == "login" and use_real_values:
        body.update(email=guest.email, password=guest.password)
    elif operation in ("refresh", "logout") and use_real_values:
        body["refresh_token"] = (logout_guest if operation == "logout" else guest).refresh_token
    elif operation in ("updateTask", "updateTaskWithPut") and not TASK_FIELDS & body.keys():
        # Unknown members are ignored, and a change without known members is rejected.
        body["completed"] = True


def new_id():
    """Returns a UUID of version 7 with the present time."""
    millis, digits = f"{int(time.time() * 1000):012x}", secrets.token_hex(9)
    return f"{millis[:8]}-{millis[8:]}-7{digits[:3]}-8{digits[3:6]}-{digits[6:18]}"


def strengthen(password):
    """Makes a password hard to guess and keeps as much of it as fits."""
    kept = password.encode()[:40].decode(errors="ignore")
    return f"{kept} {secrets.token_hex(12)}"


@schemathesis.hook
def after_call(context, case, response):
    global guest
    operation = case.operation.definition.raw["operationId"]
    if response.status_code == 200 and operation in ("login", "refresh", "changePassword"):
        tokens = response.json()
        if tokens["user"]["email"] == guest.email:
            guest.update(tokens)
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
    """Returns whether the service causes this failure."""
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        # A valid request can repeat an Idempotency-Key of an earlier one.
        return response.json()["code"] != "idempotency_key_reused"
    # Deleting the completed tasks does not delete the list.
    return not (isinstance(failure, UseAfterFree) and failure.free.endswith("/tasks"))
