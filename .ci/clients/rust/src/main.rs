//! Registers and creates a task through a client generated from the OpenAPI document.

use std::error::Error;

use todo_client::apis::configuration::Configuration;
use todo_client::apis::{account_api, tasks_api};
use todo_client::models::{Registration, TaskCompletion, TaskCreate};
use uuid::Uuid;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut api = Configuration { base_path: std::env::var("BASE_URL")?, ..Configuration::default() };

    let email = format!("rust-{}@example.com", Uuid::new_v4());
    let registration = Registration::new(email, "blue kettle sings at dawn".to_owned());
    let tokens = account_api::register(&api, registration, None).await?;
    api.bearer_access_token = Some(tokens.access_token);

    let me = &tokens.user.id;
    let key = Uuid::new_v4().to_string();
    let new = TaskCreate::new("Buy milk".to_owned());
    let task = tasks_api::create_task(&api, me, new, Some(&key), None).await?;
    assert_eq!((task.title.as_str(), &task.description), ("Buy milk", &None));

    let set = TaskCompletion { completed: Some(true) };
    let done = tasks_api::set_task_completion(&api, me, &task.id, None, None, None, Some(set)).await?;
    assert!(done.completed);

    let listed =
        tasks_api::list_tasks(&api, me, Some(true), None, None, Some(10), None, None, None, None, None).await?;
    let changes = tasks_api::list_changes(&api, me, None, None, None, None).await?;
    assert_eq!((&listed, changes.more), (&changes.tasks, false));
    assert_eq!(listed, [done]);

    println!("rust: {} created {}", tokens.user.email, task.id);
    Ok(())
}
