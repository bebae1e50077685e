//! The injector's configuration, live from the ConfigMaps `istio` and `istio-sidecar-injector`.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use mantlet_translate::inject::InjectConfig;

/// The configuration in force; clones share it.
#[derive(Clone, Default)]
pub struct InjectorConfig {
    current: Arc<ArcSwapOption<InjectConfig>>,
}

impl InjectorConfig {
    /// The last good configuration; `None` before the first one.
    pub fn current(&self) -> Option<Arc<InjectConfig>> {
        self.current.load_full()
    }

    /// Follows the ConfigMaps until the process ends. `suffix` is empty, or `-<revision>`.
    pub async fn run(self, client: Client, namespace: String, revision: String) {
        let suffix = match revision.as_str() {
            "" | "default" => String::new(),
            other => format!("-{other}"),
        };
        let injector = format!("istio-sidecar-injector{suffix}");
        let mesh = format!("{}{suffix}", mantlet_api::mesh_config::CONFIG_MAP);
        let api: Api<ConfigMap> = Api::namespaced(client, &namespace);
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let mut seen: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        let mut listing = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listing = true,
                Ok(Event::InitDone) => listing = false,
                Ok(Event::Apply(map) | Event::InitApply(map)) => {
                    let name = map.name_any();
                    if name != injector && name != mesh {
                        continue;
                    }
                    seen.insert(name, map.data.unwrap_or_default());
                }
                // A deleted ConfigMap changes nothing: the last good configuration stays.
                Ok(Event::Delete(_)) => continue,
                Err(error) => {
                    tracing::warn!(target: "webhook", "watching ConfigMaps: {error}");
                    continue;
                }
            }
            if !listing {
                self.read(seen.get(&injector), seen.get(&mesh), &revision);
            }
        }
    }

    fn read(
        &self,
        injector: Option<&BTreeMap<String, String>>,
        mesh: Option<&BTreeMap<String, String>>,
        revision: &str,
    ) {
        let Some(injector) = injector else { return };
        let text = |map: Option<&BTreeMap<String, String>>, key: &str| {
            map.and_then(|m| m.get(key)).cloned().unwrap_or_default()
        };
        let read = InjectConfig::read(
            &text(Some(injector), "config"),
            &text(Some(injector), "values"),
            &text(mesh, mantlet_api::mesh_config::CONFIG_KEY),
            revision,
        );
        match read {
            Ok(config) => self.current.store(Some(Arc::new(config))),
            Err(error) => {
                tracing::error!(target: "webhook", "injector configuration is kept as it was: {error}");
            }
        }
    }
}
