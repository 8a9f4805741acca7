"""Checks launch/k8s-jobset.yaml against the JobSet CRD as its project publishes it.

    python ci/check_jobset.py CRD.yaml        (pip install --only-binary :all: pyyaml jsonschema)

The CRD is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset. Unknown fields are refused,
as the API server does under strict validation; so are the placeholders' neighbours that must agree with each other.
"""

import sys
from pathlib import Path

import jsonschema
import yaml


def strict(schema):
    """The schema with every object closed: an API server drops what it does not know, here it is an error."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and isinstance(schema["properties"], dict) and "additionalProperties" not in schema:
            closed["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            closed = {"type": ["integer", "string"]}
        return closed
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


def main():
    crd = yaml.safe_load(Path(sys.argv[1]).read_text())
    jobset = yaml.safe_load((Path(__file__).parent.parent / "launch/k8s-jobset.yaml").read_text())
    group, version = jobset["apiVersion"].split("/")
    assert (crd["spec"]["group"], crd["spec"]["names"]["kind"]) == (group, jobset["kind"])
    schemas = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["served"]}
    schema = strict(schemas[version])
    # The CRD leaves the metadata to the API server.
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(jobset)

    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    assert pods["parallelism"] == pods["completions"] == int(env["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["NPROC_PER_NODE"])
    assert env["MASTER"] == f"{name}-{job['name']}-0-0.{subdomain}:{container['ports'][0]['containerPort']}"
    assert int(env["GRACE_S"]) < pods["template"]["spec"]["terminationGracePeriodSeconds"]
    volumes = {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    pod, own = pods["template"]["spec"]["securityContext"], container["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] and pod["fsGroup"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"]["drop"] == ["ALL"]
    # What is written to is a volume.
    assert own["readOnlyRootFilesystem"] and {"/tmp", "/dev/shm"} < {mount["mountPath"] for mount in container["volumeMounts"]}
    print(f"launch/k8s-jobset.yaml: a valid {jobset['kind']} of {jobset['apiVersion']}, and of one mind with itself")


if __name__ == "__main__":
    main()
