"""Registers and creates a task through a client generated from the OpenAPI document."""

import json
import os
import uuid

import todo_client
from todo_client import (
    AccountApi,
    ApiException,
    Registration,
    TaskCompletion,
    TaskCreate,
    TasksApi,
)

configuration = todo_client.Configuration(host=os.environ["BASE_URL"])
with todo_client.ApiClient(configuration) as client:
    tokens = AccountApi(client).register(
        Registration(
            email=f"python-{uuid.uuid4()}@example.com",
            password="blue kettle sings at dawn",
        )
    )
    configuration.access_token = tokens.access_token

    tasks = TasksApi(client)
    me = tokens.user.id
    task = tasks.create_task(
        me, TaskCreate(title="Buy milk"), idempotency_key=str(uuid.uuid4())
    )
    assert task.title == "Buy milk" and task.description is None, task

    done = tasks.set_task_completion(
        me, task.id, task_completion=TaskCompletion(completed=True)
    )
    assert done.completed and done.updated_at > task.updated_at, done
    assert tasks.list_tasks(me, completed=True, limit=10) == [done]
    changes = tasks.list_changes(me)
    assert changes.tasks == [done] and not changes.more, changes

    try:
        tasks.get_task(me, "unknown")
        raise AssertionError("an unknown task was read")
    except ApiException as error:
        assert error.status == 404, error
        assert json.loads(error.body)["code"] == "task_not_found", error

    print(f"python: {tokens.user.email} created {task.id}")
