"""Reads the topic as any consumer would, with Kafka's own client: CloudEvents attributes, schema, order and gaps.

events.py BROKERS TOPIC SCHEMA EXPECTED: exits 0 when EXPECTED events were read and everything held.
"""

import json
import sys

from confluent_kafka import Consumer
from jsonschema import Draft202012Validator, FormatChecker

brokers, topic, schema, expected = sys.argv[1:]
with open(schema, encoding="utf-8") as file:
    validator = Draft202012Validator(json.load(file), format_checker=FormatChecker())
consumer = Consumer({
    "bootstrap.servers": brokers,
    "group.id": f"python-{topic}",
    "auto.offset.reset": "earliest",
    "enable.auto.commit": False,
})
consumer.subscribe([topic])
last, kinds, seen, idle = {}, set(), set(), 0
while len(seen) < int(expected):
    message = consumer.poll(1.0)
    if message is None:
        idle += 1
        assert idle < 30, f"{len(seen)} of {expected} events came"
        continue
    assert message.error() is None, message.error()
    idle = 0
    headers = {name: value.decode() for name, value in message.headers()}
    value = json.loads(message.value())
    assert headers["ce_specversion"] == "1.0"
    assert headers["content-type"] == "application/json"
    assert headers["ce_id"] == f"{headers['ce_subject']}-{headers['ce_sequence']}"
    assert headers["ce_type"] == f"patchbay.{value['type']}"
    assert headers["ce_source"] == f"/tenants/{headers['ce_tenant']}/accounts/{value['account']}"
    assert headers["ce_time"] == value["at"]
    assert headers["ce_subject"] == value["conversation"]
    assert headers["ce_sequence"] == str(value["seq"])
    assert message.key().decode() == f"{headers['ce_tenant']}/{value['conversation']}"
    for error in validator.iter_errors(value):
        raise AssertionError(f"{headers['ce_id']}: {error.json_path}: {error.message}")
    before = last.get(value["conversation"], 0)
    assert value["seq"] <= before + 1, f"{headers['ce_id']}: a gap behind {before}"
    last[value["conversation"]] = max(before, value["seq"])
    kinds.add(value["type"])
    seen.add(headers["ce_id"])
consumer.close()
# What is wrong is told: a schema that takes everything checks nothing.
wrong = dict(value)
wrong["seq"] = "one"
assert list(validator.iter_errors(wrong)), "the schema takes what is wrong"
print(json.dumps(sorted(kinds)))
