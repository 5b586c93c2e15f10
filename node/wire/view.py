"""Protobuf messages as plain JSON data: protobuf field names, integers as integers, enums by their word."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def to_data(message: Message) -> dict[str, Any]:
    """Every field of a message by name, absent sub-messages as None.

    Unlike json_format, 64-bit integers stay numbers, and JOB_STATE_MERGING reads "merging".
    """
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_data(value)
    if field.enum_type is not None:
        return _word(field, value)
    return value


def _word(field: Any, number: int) -> str:
    """JobState 4 -> JOB_STATE_MERGING -> merging."""
    names = field.enum_type.values_by_number
    prefix = len(field.enum_type.values_by_number[0].name) - len("UNSPECIFIED")
    return str(names[number].name[prefix:].lower()) if number in names else str(number)
