//! From a container of a pod to what the shim is told: environment, command, identity, root directory.
//!
//! Called by the pod worker just before a container starts. Reads ConfigMaps and Secrets that variables refer to; the rest
//! is pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use mantlet_net::caps::Caps;

use super::fields::{self, PodFacts};
use crate::images::{Image, ImageError, Images};
use crate::rootfs::{Bind, FileEntry, RootSpec};
use crate::shim::proto::{ContainerSpec, Identity};
use crate::volumes::{self, Volumes};

/// `PATH` unless the container sets it.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Writable space outside volumes unless the container limits ephemeral storage, bytes.
const ROOT_SIZE: u64 = 512 << 20;
/// Where a container may leave its last words.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// Why a container cannot be started as specified; sorted as the kubelet's waiting reasons.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error(transparent)]
    Image(#[from] ImageError),
    /// `CreateContainerConfigError`.
    #[error("{0}")]
    Config(String),
}

/// What the cluster adds to every container.
#[derive(Clone, Debug)]
pub(crate) struct ClusterFacts {
    pub(crate) dns_server: String,
    pub(crate) cluster_domain: String,
    pub(crate) service_host: String,
    pub(crate) service_port: u16,
}

/// One container about to start.
pub(crate) struct Request<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) facts: &'a PodFacts,
    pub(crate) cluster: &'a ClusterFacts,
    pub(crate) images: &'a Images,
    pub(crate) volumes: &'a Volumes,
    pub(crate) pod_dir: &'a Path,
    pub(crate) id: &'a str,
    pub(crate) log: PathBuf,
}

/// Builds the specification; also returns the image, for events.
pub(crate) async fn build(client: &kube::Client, request: &Request<'_>) -> Result<(ContainerSpec, Image), SpecError> {
    let Request { pod, container, .. } = *request;
    let spec = pod
        .spec
        .as_ref()
        .ok_or_else(|| SpecError::Config("the pod has no spec".into()))?;
    let image_name = container.image.as_deref().unwrap_or_default();
    let has_command = container.command.as_ref().is_some_and(|c| !c.is_empty());
    let image = request.images.resolve(image_name, has_command)?;
    let identity = identity(spec, container).map_err(SpecError::Config)?;
    let env = environment(client, request, spec).await.map_err(SpecError::Config)?;
    let argv: Vec<String> = match container.command.as_ref().filter(|c| !c.is_empty()) {
        Some(command) => command.iter().map(|part| fields::expand(part, &env)).collect(),
        None => image.entrypoint.clone(),
    };
    let args = container.args.iter().flatten().map(|part| fields::expand(part, &env));
    let argv = argv.into_iter().chain(args).collect();
    let cwd = PathBuf::from(
        container
            .working_dir
            .as_deref()
            .filter(|dir| !dir.is_empty())
            .unwrap_or("/"),
    );
    if !cwd.is_absolute() {
        return Err(SpecError::Config(format!(
            "workingDir {} is not an absolute path",
            cwd.display()
        )));
    }
    let root = root_spec(request, spec, &image, &identity, &env, &cwd).map_err(SpecError::Config)?;
    let container_spec = ContainerSpec {
        id: request.id.to_owned(),
        root,
        argv,
        env,
        cwd,
        identity,
        tty: container.tty == Some(true),
        log: request.log.clone(),
        oom_score_adj: oom_score(container),
    };
    Ok((container_spec, image))
}

/// Guaranteed containers are ended last when memory runs out, those without any request first.
fn oom_score(container: &Container) -> i32 {
    let resources = container.resources.as_ref();
    let has = |map: Option<&BTreeMap<_, _>>| map.is_some_and(|map| !map.is_empty());
    if has(resources.and_then(|r| r.limits.as_ref())) {
        0
    } else if has(resources.and_then(|r| r.requests.as_ref())) {
        500
    } else {
        1000
    }
}

fn id_number(value: Option<i64>, what: &str) -> Result<Option<u32>, String> {
    match value {
        None => Ok(None),
        // Higher ids do not exist in the cluster's user namespace.
        Some(id) => u32::try_from(id)
            .ok()
            .filter(|id| *id < 65_534)
            .map(Some)
            .ok_or_else(|| format!("{what} {id} is outside 0 to 65533, the ids of this node")),
    }
}

/// User, groups and privileges from the two security contexts.
pub(crate) fn identity(spec: &PodSpec, container: &Container) -> Result<Identity, String> {
    let pod = spec.security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let uid = id_number(own.run_as_user.or(pod.run_as_user), "runAsUser")?.unwrap_or(0);
    if own.run_as_non_root.or(pod.run_as_non_root) == Some(true) && uid == 0 {
        return Err("container has runAsNonRoot and image will run as root".into());
    }
    // Without a group the user's own from the image's passwd, where the proxy's user is the only one with its own.
    let gid =
        id_number(own.run_as_group.or(pod.run_as_group), "runAsGroup")?.unwrap_or(if uid == 1337 { 1337 } else { 0 });
    let mut groups = Vec::new();
    for id in pod.supplemental_groups.into_iter().flatten().chain(pod.fs_group) {
        groups.extend(id_number(Some(id), "supplementalGroups")?);
    }
    if own.privileged == Some(true) {
        if own.allow_privilege_escalation == Some(false) {
            return Err("cannot set `allowPrivilegeEscalation` to false and `privileged` to true".into());
        }
        return Ok(Identity {
            uid,
            gid,
            groups,
            caps: Caps::ALL,
            no_new_privs: false,
            seccomp: false,
        });
    }
    let asked = own.capabilities.unwrap_or_default();
    let mut caps = Caps::container_default();
    let unknown = |name: &str| format!("unknown capability {name:?}");
    for name in asked.drop.iter().flatten() {
        caps = caps.without(name).ok_or_else(|| unknown(name))?;
    }
    for name in asked.add.iter().flatten() {
        caps = caps.with(name).ok_or_else(|| unknown(name))?;
    }
    let no_new_privs = own.allow_privilege_escalation != Some(true);
    Ok(Identity {
        uid,
        gid,
        groups,
        caps,
        no_new_privs,
        seccomp: true,
    })
}

async fn environment(
    client: &kube::Client,
    request: &Request<'_>,
    spec: &PodSpec,
) -> Result<Vec<(String, String)>, String> {
    let Request {
        pod,
        container,
        facts,
        cluster,
        ..
    } = *request;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let (host, port) = (&cluster.service_host, cluster.service_port);
    let mut env: Vec<(String, String)> = vec![
        ("PATH".into(), DEFAULT_PATH.into()),
        ("HOSTNAME".into(), hostname(pod, spec)),
        ("KUBERNETES_SERVICE_HOST".into(), host.clone()),
        ("KUBERNETES_SERVICE_PORT".into(), port.to_string()),
        ("KUBERNETES_SERVICE_PORT_HTTPS".into(), port.to_string()),
        ("KUBERNETES_PORT".into(), format!("tcp://{host}:{port}")),
        (format!("KUBERNETES_PORT_{port}_TCP"), format!("tcp://{host}:{port}")),
        (format!("KUBERNETES_PORT_{port}_TCP_PROTO"), "tcp".into()),
        (format!("KUBERNETES_PORT_{port}_TCP_PORT"), port.to_string()),
        (format!("KUBERNETES_PORT_{port}_TCP_ADDR"), host.clone()),
    ];
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let data = if let Some(source) = &from.config_map_ref {
            volumes::config_map(client, namespace, &source.name, source.optional).await?
        } else if let Some(source) = &from.secret_ref {
            volumes::secret(client, namespace, &source.name, source.optional).await?
        } else {
            None
        };
        for (key, value) in data.into_iter().flatten() {
            set(
                &mut env,
                format!("{prefix}{key}"),
                String::from_utf8_lossy(&value).into_owned(),
            );
        }
    }
    for var in container.env.iter().flatten() {
        let value = match (&var.value, &var.value_from) {
            (Some(value), _) => fields::expand(value, &env),
            (None, None) => String::new(),
            (None, Some(from)) => {
                if let Some(reference) = &from.field_ref {
                    fields::field(pod, facts, &reference.field_path)?
                } else if let Some(selector) = &from.resource_field_ref {
                    fields::resource(pod, container, facts, selector)?
                } else if let Some(source) = &from.config_map_key_ref {
                    let data = volumes::config_map(client, namespace, &source.name, source.optional).await?;
                    match key(data, &source.key, "configmap", &source.name, source.optional)? {
                        Some(value) => value,
                        None => continue,
                    }
                } else if let Some(source) = &from.secret_key_ref {
                    let data = volumes::secret(client, namespace, &source.name, source.optional).await?;
                    match key(data, &source.key, "secret", &source.name, source.optional)? {
                        Some(value) => value,
                        None => continue,
                    }
                } else {
                    return Err(format!("env {}: this kind of valueFrom is not supported", var.name));
                }
            }
        };
        set(&mut env, var.name.clone(), value);
    }
    if !env.iter().any(|(name, _)| name == "HOME") {
        let uid = identity(spec, container).map_or(0, |identity| identity.uid);
        env.push(("HOME".into(), home(uid).into()));
    }
    if container.tty == Some(true) && !env.iter().any(|(name, _)| name == "TERM") {
        env.push(("TERM".into(), "xterm".into()));
    }
    Ok(env)
}

fn set(env: &mut Vec<(String, String)>, name: String, value: String) {
    env.retain(|(n, _)| *n != name);
    env.push((name, value));
}

fn key(
    data: Option<BTreeMap<String, Vec<u8>>>,
    key: &str,
    kind: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<String>, String> {
    match data.and_then(|mut data| data.remove(key)) {
        Some(value) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
        None if optional == Some(true) => Ok(None),
        None => Err(format!("couldn't find key {key} in {kind} {name}")),
    }
}

/// The pod's host name: `spec.hostname`, else its name, at most 63 characters.
pub(crate) fn hostname(pod: &Pod, spec: &PodSpec) -> String {
    let name = spec
        .hostname
        .as_deref()
        .filter(|n| !n.is_empty())
        .or(pod.metadata.name.as_deref())
        .unwrap_or("pod");
    name.chars()
        .take(63)
        .collect::<String>()
        .trim_end_matches(['-', '.'])
        .to_owned()
}

fn home(uid: u32) -> &'static str {
    match uid {
        0 => "/root",
        1337 => "/home/istio-proxy",
        _ => "/",
    }
}

fn root_spec(
    request: &Request<'_>,
    spec: &PodSpec,
    image: &Image,
    identity: &Identity,
    env: &[(String, String)],
    cwd: &Path,
) -> Result<RootSpec, String> {
    let Request {
        pod,
        container,
        facts,
        cluster,
        volumes,
        pod_dir,
        id,
        ..
    } = *request;
    let own = container.security_context.clone().unwrap_or_default();
    let mountpoint = pod_dir.join("roots").join(id);
    let io = |error: std::io::Error| format!("{}: {error}", mountpoint.display());
    std::fs::create_dir_all(&mountpoint).map_err(io)?;
    let termination = termination_file(pod_dir, id);
    if let Some(parent) = termination.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    std::fs::write(&termination, b"").map_err(io)?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&termination, std::fs::Permissions::from_mode(0o666)).map_err(io)?;
    let mut binds = vec![Bind {
        source: termination,
        sub_path: None,
        target: container
            .termination_message_path
            .clone()
            .unwrap_or_else(|| TERMINATION_LOG.into())
            .into(),
        read_only: false,
    }];
    for mount in container.volume_mounts.iter().flatten() {
        let volume = spec
            .volumes
            .iter()
            .flatten()
            .find(|volume| volume.name == mount.name)
            .ok_or_else(|| format!("volumeMounts: volume {:?} is not defined", mount.name))?;
        let sub_path = match (&mount.sub_path, &mount.sub_path_expr) {
            (_, Some(expr)) if !expr.is_empty() => Some(fields::expand(expr, env)),
            (path, _) => path.clone(),
        };
        if sub_path
            .as_deref()
            .is_some_and(|p| p.starts_with('/') || p.split('/').any(|part| part == ".."))
        {
            return Err(format!(
                "volumeMounts {:?}: subPath must be relative and must not contain '..'",
                mount.name
            ));
        }
        let target = PathBuf::from(&mount.mount_path);
        if !target.is_absolute() || target == Path::new("/") {
            return Err(format!(
                "volumeMounts {:?}: mountPath {:?} is not usable",
                mount.name, mount.mount_path
            ));
        }
        let generated = volume.empty_dir.is_none();
        binds.push(Bind {
            source: volumes.path(volume),
            sub_path,
            target,
            read_only: mount.read_only == Some(true) || generated,
        });
    }
    // Parents first, so that a mount below another one is not hidden by it.
    binds.sort_by_key(|bind| bind.target.components().count());
    let limit = |name: &str| {
        let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
        limits
            .and_then(|l| l.get(name))
            .and_then(|q| fields::quantity_milli(&q.0))
            .map(|milli| milli / 1000)
    };
    let size = limit("ephemeral-storage")
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(ROOT_SIZE);
    Ok(RootSpec {
        mountpoint,
        size,
        read_only: own.read_only_root_filesystem == Some(true),
        privileged: own.privileged == Some(true),
        programs: image.programs.clone(),
        files: etc_files(pod, spec, facts, cluster, identity),
        home: (PathBuf::from(home(identity.uid)), identity.uid, identity.gid),
        working_dir: (cwd.to_owned(), identity.uid, identity.gid),
        binds,
    })
}

/// The node's file behind a container's termination message path.
pub(crate) fn termination_file(pod_dir: &Path, id: &str) -> PathBuf {
    pod_dir.join("termination").join(id)
}

/// Generated files of `/etc`.
fn etc_files(
    pod: &Pod,
    spec: &PodSpec,
    facts: &PodFacts,
    cluster: &ClusterFacts,
    identity: &Identity,
) -> Vec<FileEntry> {
    let mut passwd = String::from(
        "root:x:0:0:root:/root:/bin/bash\n\
         daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n\
         tcpdump:x:104:104::/nonexistent:/usr/sbin/nologin\n\
         istio-proxy:x:1337:1337::/home/istio-proxy:/bin/bash\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    );
    let mut group =
        String::from("root:x:0:\ndaemon:x:1:\ntty:x:5:\ntcpdump:x:104:\nistio-proxy:x:1337:\nnogroup:x:65534:\n");
    let (uid, gid) = (identity.uid, identity.gid);
    if ![0, 1, 104, 1337, 65534].contains(&uid) {
        passwd.push_str(&format!("app:x:{uid}:{gid}::/:/bin/sh\n"));
    }
    if ![0, 1, 5, 104, 1337, 65534].contains(&gid) {
        group.push_str(&format!("app:x:{gid}:\n"));
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let hostname = hostname(pod, spec);
    let domain = &cluster.cluster_domain;
    let mut hosts = String::from("# Managed by the node agent.\n127.0.0.1\tlocalhost\n");
    match spec.subdomain.as_deref().filter(|s| !s.is_empty()) {
        Some(sub) => {
            hosts.push_str(&format!(
                "{}\t{hostname}.{sub}.{namespace}.svc.{domain}\t{hostname}\n",
                facts.pod_ip
            ));
        }
        None => hosts.push_str(&format!("{}\t{hostname}\n", facts.pod_ip)),
    }
    for alias in spec.host_aliases.iter().flatten() {
        hosts.push_str(&format!(
            "{}\t{}\n",
            alias.ip,
            alias.hostnames.iter().flatten().cloned().collect::<Vec<_>>().join("\t")
        ));
    }
    let file = |path: &str, text: String| FileEntry {
        path: path.into(),
        text,
        mode: 0o644,
    };
    vec![
        file("/etc/passwd", passwd),
        file("/etc/group", group),
        file("/etc/hosts", hosts),
        file("/etc/hostname", format!("{hostname}\n")),
        file(
            "/etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n".into(),
        ),
        file("/etc/resolv.conf", resolv_conf(spec, namespace, cluster)),
    ]
}

fn resolv_conf(spec: &PodSpec, namespace: &str, cluster: &ClusterFacts) -> String {
    let domain = &cluster.cluster_domain;
    let config = spec.dns_config.clone().unwrap_or_default();
    let own_only = spec.dns_policy.as_deref() == Some("None");
    let mut servers = if own_only {
        Vec::new()
    } else {
        vec![cluster.dns_server.clone()]
    };
    servers.extend(config.nameservers.into_iter().flatten());
    let mut search = if own_only {
        Vec::new()
    } else {
        vec![
            format!("{namespace}.svc.{domain}"),
            format!("svc.{domain}"),
            domain.clone(),
        ]
    };
    search.extend(config.searches.into_iter().flatten());
    let mut options: Vec<String> = if own_only { Vec::new() } else { vec!["ndots:5".into()] };
    for option in config.options.into_iter().flatten() {
        let name = option.name.unwrap_or_default();
        options.retain(|o| o.split(':').next() != Some(name.as_str()));
        options.push(option.value.map_or(name.clone(), |value| format!("{name}:{value}")));
    }
    let mut text = String::new();
    if !search.is_empty() {
        text.push_str(&format!("search {}\n", search.join(" ")));
    }
    for server in servers.iter().take(3) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    text
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
