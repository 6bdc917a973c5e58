//! Pods with the agent as the types of the Kubernetes API know them: no field that there is not, no wrong type.

use k8s_openapi::api::core::v1::Pod;

use super::*;

/// A pod with every field of a pod's spec that Kubernetes 1.33 has, each in one place at least. No API server would take
/// it whole: some of the fields exclude each other.
const RICH: &str = r##"{
  "apiVersion": "v1",
  "kind": "Pod",
  "metadata": {
    "annotations": { "a/~b": "c", "coalmine.dev/port": "http", "coalmine.dev/tenant": "header:x-tenant-id" },
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "deletionGracePeriodSeconds": 30,
    "deletionTimestamp": "2026-01-01T00:00:30Z",
    "finalizers": ["example.com/keep"],
    "generateName": "checkout-",
    "generation": 3,
    "labels": {
      "app.kubernetes.io/name": "checkout",
      "app.kubernetes.io/version": "v2",
      "coalmine.dev/arm": "canary",
      "coalmine.dev/inject": "enabled"
    },
    "managedFields": [{
      "apiVersion": "v1",
      "fieldsType": "FieldsV1",
      "fieldsV1": { "f:metadata": { "f:labels": { ".": {} } } },
      "manager": "kubectl",
      "operation": "Apply",
      "subresource": "status",
      "time": "2026-01-01T00:00:00Z"
    }],
    "name": "checkout-1",
    "namespace": "shop",
    "ownerReferences": [{
      "apiVersion": "apps/v1",
      "blockOwnerDeletion": true,
      "controller": true,
      "kind": "ReplicaSet",
      "name": "checkout",
      "uid": "1"
    }],
    "resourceVersion": "7",
    "selfLink": "/api/v1/namespaces/shop/pods/checkout-1",
    "uid": "2"
  },
  "spec": {
    "activeDeadlineSeconds": 86400,
    "affinity": {
      "nodeAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [{
          "preference": { "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["node-1"] }] },
          "weight": 5
        }],
        "requiredDuringSchedulingIgnoredDuringExecution": {
          "nodeSelectorTerms": [{ "matchExpressions": [{ "key": "zone", "operator": "Exists" }] }]
        }
      },
      "podAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [{
          "podAffinityTerm": {
            "labelSelector": {
              "matchExpressions": [{ "key": "app", "operator": "NotIn", "values": ["other"] }],
              "matchLabels": { "app": "checkout" }
            },
            "matchLabelKeys": ["pod-template-hash"],
            "mismatchLabelKeys": ["tier"],
            "namespaceSelector": { "matchLabels": { "team": "shop" } },
            "namespaces": ["shop"],
            "topologyKey": "zone"
          },
          "weight": 1
        }],
        "requiredDuringSchedulingIgnoredDuringExecution": [{ "topologyKey": "zone" }]
      },
      "podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
          { "podAffinityTerm": { "topologyKey": "zone" }, "weight": 100 }
        ],
        "requiredDuringSchedulingIgnoredDuringExecution": [{ "topologyKey": "kubernetes.io/hostname" }]
      }
    },
    "automountServiceAccountToken": true,
    "containers": [
      {
        "args": ["serve", "--port=$(PORT)"],
        "command": ["/bin/checkout"],
        "env": [
          { "name": "PORT", "value": "8080" },
          { "name": "UID", "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.uid" } } },
          { "name": "CPU", "valueFrom": {
            "resourceFieldRef": { "containerName": "app", "divisor": "1m", "resource": "limits.cpu" }
          } },
          { "name": "COLOUR", "valueFrom": {
            "configMapKeyRef": { "key": "colour", "name": "settings", "optional": true }
          } },
          { "name": "SECRET", "valueFrom": {
            "secretKeyRef": { "key": "password", "name": "secrets", "optional": false }
          } }
        ],
        "envFrom": [
          { "configMapRef": { "name": "settings", "optional": true }, "prefix": "S_" },
          { "secretRef": { "name": "secrets", "optional": true } }
        ],
        "image": "app:1",
        "imagePullPolicy": "Always",
        "lifecycle": {
          "postStart": { "httpGet": {
            "host": "127.0.0.1",
            "httpHeaders": [{ "name": "x-tenant-id", "value": "acme" }],
            "path": "/warm",
            "port": "http",
            "scheme": "HTTP"
          } },
          "preStop": { "sleep": { "seconds": 5 } },
          "stopSignal": "SIGTERM"
        },
        "livenessProbe": {
          "failureThreshold": 3,
          "initialDelaySeconds": 1,
          "periodSeconds": 10,
          "successThreshold": 1,
          "tcpSocket": { "host": "127.0.0.1", "port": "http" },
          "terminationGracePeriodSeconds": 5,
          "timeoutSeconds": 2
        },
        "name": "app",
        "ports": [
          { "containerPort": 8080, "name": "http", "protocol": "TCP" },
          { "containerPort": 9100, "hostIP": "10.0.0.1", "hostPort": 9100, "name": "metrics", "protocol": "TCP" }
        ],
        "readinessProbe": { "httpGet": { "path": "/healthz", "port": "http" } },
        "resizePolicy": [{ "resourceName": "cpu", "restartPolicy": "NotRequired" }],
        "resources": {
          "claims": [{ "name": "gpu", "request": "one" }],
          "limits": { "cpu": "2", "memory": "1Gi" },
          "requests": { "cpu": "500m", "memory": "512Mi" }
        },
        "securityContext": {
          "allowPrivilegeEscalation": false,
          "appArmorProfile": { "localhostProfile": "checkout", "type": "Localhost" },
          "capabilities": { "add": ["NET_BIND_SERVICE"], "drop": ["ALL"] },
          "privileged": false,
          "procMount": "Default",
          "readOnlyRootFilesystem": true,
          "runAsGroup": 1000,
          "runAsNonRoot": true,
          "runAsUser": 1000,
          "seLinuxOptions": { "level": "s0", "role": "r", "type": "t", "user": "u" },
          "seccompProfile": { "localhostProfile": "checkout.json", "type": "Localhost" },
          "windowsOptions": {
            "gmsaCredentialSpec": "{}",
            "gmsaCredentialSpecName": "spec",
            "hostProcess": false,
            "runAsUserName": "user"
          }
        },
        "startupProbe": { "grpc": { "port": 8080, "service": "health" } },
        "stdin": true,
        "stdinOnce": true,
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "tty": true,
        "volumeDevices": [{ "devicePath": "/dev/xvda", "name": "claim" }],
        "volumeMounts": [{
          "mountPath": "/data",
          "mountPropagation": "None",
          "name": "data",
          "readOnly": true,
          "recursiveReadOnly": "IfPossible",
          "subPath": "a",
          "subPathExpr": "$(PORT)"
        }],
        "workingDir": "/srv"
      },
      {
        "lifecycle": { "preStop": { "tcpSocket": { "host": "127.0.0.1", "port": 7001 } } },
        "livenessProbe": { "exec": { "command": ["true"] } },
        "name": "beside"
      }
    ],
    "dnsConfig": {
      "nameservers": ["10.0.0.10"],
      "options": [{ "name": "ndots", "value": "2" }],
      "searches": ["shop.svc.cluster.local"]
    },
    "dnsPolicy": "ClusterFirst",
    "enableServiceLinks": false,
    "ephemeralContainers": [{
      "args": ["-c", "true"],
      "command": ["/bin/sh"],
      "env": [{ "name": "A", "value": "B" }],
      "envFrom": [{ "prefix": "E_", "secretRef": { "name": "secrets" } }],
      "image": "debug:1",
      "imagePullPolicy": "IfNotPresent",
      "lifecycle": { "preStop": { "exec": { "command": ["true"] } } },
      "livenessProbe": { "exec": { "command": ["true"] } },
      "name": "debug",
      "ports": [{ "containerPort": 7000 }],
      "readinessProbe": { "exec": { "command": ["true"] } },
      "resizePolicy": [{ "resourceName": "memory", "restartPolicy": "RestartContainer" }],
      "resources": {},
      "restartPolicy": "Always",
      "securityContext": {},
      "startupProbe": { "exec": { "command": ["true"] } },
      "stdin": true,
      "stdinOnce": false,
      "targetContainerName": "app",
      "terminationMessagePath": "/dev/termination-log",
      "terminationMessagePolicy": "File",
      "tty": true,
      "volumeDevices": [],
      "volumeMounts": [],
      "workingDir": "/"
    }],
    "hostAliases": [{ "hostnames": ["old"], "ip": "10.0.0.2" }],
    "hostIPC": false,
    "hostNetwork": false,
    "hostPID": false,
    "hostUsers": false,
    "hostname": "checkout",
    "imagePullSecrets": [{ "name": "registry" }],
    "initContainers": [
      { "command": ["/bin/migrate"], "image": "app:1", "name": "migrate" },
      { "image": "proxy:1", "name": "proxy", "restartPolicy": "Always" }
    ],
    "nodeName": "node-1",
    "nodeSelector": { "kubernetes.io/os": "linux" },
    "os": { "name": "linux" },
    "overhead": { "cpu": "10m" },
    "preemptionPolicy": "Never",
    "priority": -5,
    "priorityClassName": "low",
    "readinessGates": [{ "conditionType": "example.com/ready" }],
    "resourceClaims": [
      { "name": "gpu", "resourceClaimName": "gpu" },
      { "name": "other", "resourceClaimTemplateName": "gpus" }
    ],
    "resources": { "limits": { "cpu": "4" } },
    "restartPolicy": "Always",
    "runtimeClassName": "runc",
    "schedulerName": "default-scheduler",
    "schedulingGates": [{ "name": "example.com/wait" }],
    "securityContext": {
      "appArmorProfile": { "type": "RuntimeDefault" },
      "fsGroup": 1000,
      "fsGroupChangePolicy": "OnRootMismatch",
      "runAsGroup": 1000,
      "runAsNonRoot": true,
      "runAsUser": 4294967295,
      "seLinuxChangePolicy": "MountOption",
      "seLinuxOptions": { "level": "s0" },
      "seccompProfile": { "type": "RuntimeDefault" },
      "supplementalGroups": [1, 2],
      "supplementalGroupsPolicy": "Strict",
      "sysctls": [{ "name": "net.core.somaxconn", "value": "1024" }],
      "windowsOptions": {}
    },
    "serviceAccount": "checkout",
    "serviceAccountName": "checkout",
    "setHostnameAsFQDN": false,
    "shareProcessNamespace": false,
    "subdomain": "shop",
    "terminationGracePeriodSeconds": 30,
    "tolerations": [
      { "effect": "NoExecute", "key": "a", "operator": "Equal", "tolerationSeconds": 60, "value": "b" }
    ],
    "topologySpreadConstraints": [{
      "labelSelector": { "matchLabels": { "app": "checkout" } },
      "matchLabelKeys": ["pod-template-hash"],
      "maxSkew": 1,
      "minDomains": 2,
      "nodeAffinityPolicy": "Honor",
      "nodeTaintsPolicy": "Ignore",
      "topologyKey": "zone",
      "whenUnsatisfiable": "ScheduleAnyway"
    }],
    "volumes": [
      { "name": "data", "emptyDir": { "medium": "Memory", "sizeLimit": "64Mi" } },
      { "name": "claim", "persistentVolumeClaim": { "claimName": "checkout", "readOnly": true } },
      { "name": "own", "ephemeral": { "volumeClaimTemplate": {
        "metadata": { "labels": { "app": "checkout" } },
        "spec": {
          "accessModes": ["ReadWriteOnce"],
          "dataSource": { "apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "s" },
          "dataSourceRef": { "apiGroup": "", "kind": "PersistentVolumeClaim", "name": "s", "namespace": "shop" },
          "resources": { "limits": { "storage": "2Gi" }, "requests": { "storage": "1Gi" } },
          "selector": { "matchLabels": { "disk": "fast" } },
          "storageClassName": "fast",
          "volumeAttributesClassName": "gold",
          "volumeMode": "Filesystem",
          "volumeName": "pv-1"
        }
      } } },
      { "name": "settings", "configMap": {
        "defaultMode": 420,
        "items": [{ "key": "a", "mode": 256, "path": "b" }],
        "name": "settings",
        "optional": true
      } },
      { "name": "secrets", "secret": {
        "defaultMode": 256,
        "items": [{ "key": "a", "path": "b" }],
        "optional": false,
        "secretName": "secrets"
      } },
      { "name": "pod", "downwardAPI": { "defaultMode": 420, "items": [
        { "fieldRef": { "fieldPath": "metadata.name" }, "mode": 256, "path": "name" },
        { "path": "cpu", "resourceFieldRef": { "containerName": "app", "divisor": "1", "resource": "limits.cpu" } }
      ] } },
      { "name": "all", "projected": { "defaultMode": 420, "sources": [
        { "clusterTrustBundle": {
          "labelSelector": { "matchLabels": { "a": "b" } },
          "name": "bundle",
          "optional": true,
          "path": "ca.crt",
          "signerName": "example.com/signer"
        } },
        { "configMap": { "items": [{ "key": "a", "path": "b" }], "name": "settings", "optional": true } },
        { "downwardAPI": { "items": [{ "fieldRef": { "fieldPath": "metadata.uid" }, "path": "uid" }] } },
        { "secret": { "items": [{ "key": "a", "path": "b" }], "name": "secrets", "optional": true } },
        { "serviceAccountToken": { "audience": "bank", "expirationSeconds": 7200, "path": "token" } }
      ] } },
      { "name": "host", "hostPath": { "path": "/srv", "type": "Directory" } },
      { "name": "artifact", "image": { "pullPolicy": "Always", "reference": "registry.example/data:1" } },
      { "name": "driver", "csi": {
        "driver": "csi.example.com",
        "fsType": "ext4",
        "nodePublishSecretRef": { "name": "secrets" },
        "readOnly": true,
        "volumeAttributes": { "a": "b" }
      } },
      { "name": "nfs", "nfs": { "path": "/export", "readOnly": true, "server": "nfs.example" } },
      { "name": "aws", "awsElasticBlockStore": {
        "fsType": "ext4", "partition": 1, "readOnly": true, "volumeID": "vol-1"
      } },
      { "name": "azure-disk", "azureDisk": {
        "cachingMode": "None", "diskName": "d", "diskURI": "u", "fsType": "ext4", "kind": "Managed", "readOnly": true
      } },
      { "name": "azure-file", "azureFile": { "readOnly": true, "secretName": "s", "shareName": "t" } },
      { "name": "ceph", "cephfs": {
        "monitors": ["m"], "path": "/", "readOnly": true, "secretFile": "/f", "secretRef": { "name": "s" }, "user": "u"
      } },
      { "name": "cinder", "cinder": {
        "fsType": "ext4", "readOnly": true, "secretRef": { "name": "s" }, "volumeID": "v"
      } },
      { "name": "fc", "fc": {
        "fsType": "ext4", "lun": 0, "readOnly": true, "targetWWNs": ["5005"], "wwids": ["3600"]
      } },
      { "name": "flex", "flexVolume": {
        "driver": "d", "fsType": "ext4", "options": { "a": "b" }, "readOnly": true, "secretRef": { "name": "s" }
      } },
      { "name": "flocker", "flocker": { "datasetName": "d", "datasetUUID": "u" } },
      { "name": "gce", "gcePersistentDisk": { "fsType": "ext4", "partition": 1, "pdName": "p", "readOnly": true } },
      { "name": "git", "gitRepo": { "directory": ".", "repository": "r", "revision": "v" } },
      { "name": "gluster", "glusterfs": { "endpoints": "e", "path": "p", "readOnly": true } },
      { "name": "iscsi", "iscsi": {
        "chapAuthDiscovery": true,
        "chapAuthSession": true,
        "fsType": "ext4",
        "initiatorName": "i",
        "iqn": "q",
        "iscsiInterface": "default",
        "lun": 1,
        "portals": ["p"],
        "readOnly": true,
        "secretRef": { "name": "s" },
        "targetPortal": "t"
      } },
      { "name": "photon", "photonPersistentDisk": { "fsType": "ext4", "pdID": "p" } },
      { "name": "portworx", "portworxVolume": { "fsType": "ext4", "readOnly": true, "volumeID": "v" } },
      { "name": "quobyte", "quobyte": {
        "group": "g", "readOnly": true, "registry": "r", "tenant": "t", "user": "u", "volume": "v"
      } },
      { "name": "rbd", "rbd": {
        "fsType": "ext4",
        "image": "i",
        "keyring": "/k",
        "monitors": ["m"],
        "pool": "p",
        "readOnly": true,
        "secretRef": { "name": "s" },
        "user": "u"
      } },
      { "name": "scale-io", "scaleIO": {
        "fsType": "xfs",
        "gateway": "g",
        "protectionDomain": "d",
        "readOnly": true,
        "secretRef": { "name": "s" },
        "sslEnabled": true,
        "storageMode": "m",
        "storagePool": "p",
        "system": "y",
        "volumeName": "v"
      } },
      { "name": "storage-os", "storageos": {
        "fsType": "ext4", "readOnly": true, "secretRef": { "name": "s" }, "volumeName": "v", "volumeNamespace": "n"
      } },
      { "name": "vsphere", "vsphereVolume": {
        "fsType": "ext4", "storagePolicyID": "i", "storagePolicyName": "n", "volumePath": "p"
      } }
    ]
  },
  "status": { "phase": "Pending", "startTime": "2026-01-01T00:00:01Z" }
}"##;

/// What is left of a pod that goes through the type.
fn through_the_type(pod: &Value) -> Result<Value, serde_json::Error> {
    let typed: Pod = serde_json::from_value(pod.clone())?;
    serde_json::to_value(&typed)
}

fn rich() -> Value {
    serde_json::from_str(RICH).unwrap()
}

/// One container serves, and 499 stand beside it.
fn with_many_containers() -> Value {
    let mut pod = pod();
    let beside = (1..500).map(|number| json!({ "name": format!("beside-{number}"), "image": "beside:1" }));
    pod["spec"]["containers"].as_array_mut().unwrap().extend(beside);
    pod
}

/// Everything that an annotation can set.
fn with_every_setting() -> Value {
    annotated(json!({
        "coalmine.dev/port": "8080",
        "coalmine.dev/service": "till",
        "coalmine.dev/version": "v3",
        "coalmine.dev/tenant": "header:x-tenant-id fixed:rest",
        "coalmine.dev/pool-port": "5432",
        "coalmine.dev/pool-scrape": "http://127.0.0.1:9100/metrics",
        "coalmine.dev/idle-timeout": "30s",
        "coalmine.dev/drain": "5s",
        "coalmine.dev/proxy-protocol": "true",
        "coalmine.dev/max-connections": "1000",
        "coalmine.dev/max-tenants": "1000",
        "coalmine.dev/cpu-request": "0.25",
        "coalmine.dev/cpu-limit": "1",
        "coalmine.dev/memory-request": "64Mi",
        "coalmine.dev/memory-limit": "1Gi",
    }))
}

#[test]
fn a_pod_with_the_agent_has_no_field_that_there_is_not() {
    let mut with_volumes = pod();
    with_volumes["spec"]["volumes"] = json!([{ "name": "tmp", "emptyDir": {} }]);
    with_volumes["spec"]["initContainers"] = json!([]);
    let mut with_resources = pod();
    with_resources["spec"]["resources"] = json!({ "limits": { "cpu": "1", "memory": "64Mi" } });
    let pods = [
        ("plain", pod()),
        ("with volumes", with_volumes),
        ("with resources", with_resources),
        ("with settings", with_every_setting()),
        ("with many containers", with_many_containers()),
        ("rich", rich()),
    ];
    for (what, pod) in &pods {
        assert_eq!(through_the_type(pod).unwrap(), *pod, "{what}: before");
        for settings in [settings(), ordinary(), with_tokens()] {
            let patched = injected(pod, &settings);
            let back = through_the_type(&patched).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(back, patched, "{what}: {settings:?}");
        }
    }
}

#[test]
fn what_the_type_does_not_know_would_be_noticed() {
    let patched = injected(&pod(), &settings());
    let agent = "/spec/initContainers/0";
    let with = |key: &str, value: Value| {
        let mut pod = patched.clone();
        pod.pointer_mut(agent).unwrap()[key] = value;
        pod
    };
    let misspelt = with("imagePullPolcy", json!("Always"));
    assert_eq!(through_the_type(&misspelt).unwrap(), patched);
    assert!(through_the_type(&with("restartPolicy", json!(true))).is_err());
    assert!(through_the_type(&with("ports", json!([{ "containerPort": "15080" }]))).is_err());
}
