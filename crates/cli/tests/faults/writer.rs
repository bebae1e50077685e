//! Writes to the API without a pause, and remembers what was acknowledged.
//!
//! ConfigMaps are created; a policy of the mesh is changed, which every server's proxy must follow. A write without an
//! answer may or may not have happened, so only acknowledged ones are looked for afterwards.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::discovery::ApiResource;
use kube::{Client, Config, ResourceExt};

/// Where the ConfigMaps go.
const NAMESPACE: &str = "writes";
/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Log {
    /// Numbers of acknowledged ConfigMaps that must exist.
    exist: Vec<u64>,
    /// Last acknowledged number of the policy, and the last that was sent.
    policy: (u64, u64),
    acknowledged: u64,
    unanswered: u64,
}

/// The writer; it ends when dropped.
pub(crate) struct Writer {
    kubeconfig: PathBuf,
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What the writer has to say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    /// Writes that were acknowledged so far.
    pub(crate) acknowledged: u64,
    /// Writes without an answer, or with a refusal, so far.
    pub(crate) unanswered: u64,
    /// Acknowledged writes that are not there.
    pub(crate) lost: u64,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

async fn client(kubeconfig: &PathBuf) -> Result<Client, String> {
    let text = Kubeconfig::read_from(kubeconfig).map_err(|e| e.to_string())?;
    let mut config = Config::from_custom_kubeconfig(text, &KubeConfigOptions::default())
        .await
        .map_err(|e| e.to_string())?;
    config.connect_timeout = Some(LIMIT);
    config.read_timeout = Some(LIMIT);
    Client::try_from(config).map_err(|e| e.to_string())
}

fn policies(client: &Client) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "security.istio.io".into(),
        version: "v1".into(),
        api_version: "security.istio.io/v1".into(),
        kind: "AuthorizationPolicy".into(),
        plural: "authorizationpolicies".into(),
    };
    Api::namespaced_with(client.clone(), "shop", &resource)
}

fn data(number: u64) -> String {
    format!("write {number} of the test")
}

async fn write(kubeconfig: PathBuf, log: Arc<Mutex<Log>>, stop: Arc<AtomicBool>) {
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        let Ok(client) = client(&kubeconfig).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
        let policies = policies(&client);
        while !stop.load(Ordering::SeqCst) {
            number += 1;
            let answered = if number % 8 == 0 {
                log.lock().expect("no writer panics").policy.1 = number;
                let change = serde_json::json!({ "spec": {
                    "selector": { "matchLabels": { "app": "web" } },
                    "action": "DENY",
                    "rules": [{ "to": [{ "operation": { "paths": [format!("/written/{number}")] } }] }],
                }});
                let (options, change) = (PatchParams::default(), Patch::Merge(&change));
                let written = policies.patch("churn", &options, &change);
                tokio::time::timeout(LIMIT, written)
                    .await
                    .is_ok_and(|r| r.is_ok())
                    .then(|| {
                        log.lock().expect("no writer panics").policy.0 = number;
                    })
            } else {
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(format!("w-{number}")),
                        ..ObjectMeta::default()
                    },
                    data: Some([("text".to_owned(), data(number))].into()),
                    ..ConfigMap::default()
                };
                let options = PostParams::default();
                let written = maps.create(&options, &map);
                tokio::time::timeout(LIMIT, written)
                    .await
                    .is_ok_and(|r| r.is_ok())
                    .then(|| {
                        log.lock().expect("no writer panics").exist.push(number);
                    })
            };
            {
                let mut log = log.lock().expect("no writer panics");
                match answered {
                    Some(()) => log.acknowledged += 1,
                    None => log.unanswered += 1,
                }
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
            if answered.is_none() {
                // A new connection: the old one may be to an API server that is gone.
                break;
            }
        }
    }
}

impl Writer {
    /// Starts to write.
    pub(crate) fn start(kubeconfig: PathBuf) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (kubeconfig, log, stop) = (kubeconfig.clone(), log.clone(), stop.clone());
            std::thread::spawn(move || runtime().block_on(write(kubeconfig, log, stop)))
        };
        Self {
            kubeconfig,
            log,
            stop,
            thread: Some(thread),
        }
    }

    /// Looks for every acknowledged write, then deletes what was found, so that a long run does not fill the store.
    pub(crate) fn verify(&self) -> Written {
        runtime().block_on(async {
            let client = client(&self.kubeconfig).await.expect("the API is there");
            let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
            let (numbers, least, acknowledged, unanswered) = {
                let log = self.log.lock().expect("no writer panics");
                (log.exist.clone(), log.policy.0, log.acknowledged, log.unanswered)
            };
            let found = maps.list(&ListParams::default()).await.expect("a list").items;
            let found: std::collections::HashMap<String, ConfigMap> =
                found.into_iter().map(|map| (map.name_any(), map)).collect();
            let mut lost = 0;
            for number in &numbers {
                let text = found
                    .get(&format!("w-{number}"))
                    .and_then(|map| map.data.as_ref()?.get("text"));
                if text != Some(&data(*number)) {
                    eprintln!("w-{number} was acknowledged and is lost");
                    lost += 1;
                }
            }
            if least > 0 {
                let policy = policies(&client).get("churn").await.expect("the policy");
                let path = policy.data["spec"]["rules"][0]["to"][0]["operation"]["paths"][0].clone();
                let path = path.as_str().unwrap_or_default().to_owned();
                let is: u64 = path.rsplit('/').next().and_then(|n| n.parse().ok()).unwrap_or_default();
                let sent = self.log.lock().expect("no writer panics").policy.1;
                if !(least..=sent).contains(&is) {
                    eprintln!("policy churn holds {path}, but {least} was acknowledged and {sent} was the last sent");
                    lost += 1;
                }
            }
            for number in &numbers {
                let _ = maps.delete(&format!("w-{number}"), &Default::default()).await;
            }
            self.log
                .lock()
                .expect("no writer panics")
                .exist
                .retain(|n| !numbers.contains(n));
            Written {
                acknowledged,
                unanswered,
                lost,
            }
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
