from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_UNKNOWN_MODEL: _ClassVar[Reason]
    REASON_LICENCE_NOT_GRANTED: _ClassVar[Reason]
    REASON_PURPOSE_NOT_ALLOWED: _ClassVar[Reason]
    REASON_PEER_NOT_ALLOWED: _ClassVar[Reason]
    REASON_QUOTA_EXCEEDED: _ClassVar[Reason]
    REASON_NOT_ENTITLED: _ClassVar[Reason]
    REASON_EXPIRED: _ClassVar[Reason]
    REASON_MALFORMED: _ClassVar[Reason]
    REASON_BUSY: _ClassVar[Reason]
    REASON_WRONG_NETWORK: _ClassVar[Reason]
REASON_UNSPECIFIED: Reason
REASON_UNKNOWN_MODEL: Reason
REASON_LICENCE_NOT_GRANTED: Reason
REASON_PURPOSE_NOT_ALLOWED: Reason
REASON_PEER_NOT_ALLOWED: Reason
REASON_QUOTA_EXCEEDED: Reason
REASON_NOT_ENTITLED: Reason
REASON_EXPIRED: Reason
REASON_MALFORMED: Reason
REASON_BUSY: Reason
REASON_WRONG_NETWORK: Reason

class ModelRef(_message.Message):
    __slots__ = ("model_id", "publisher")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    publisher: str
    def __init__(self, model_id: _Optional[str] = ..., publisher: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("publisher", "files")
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    publisher: str
    files: _containers.RepeatedCompositeFieldContainer[HeldFile]
    def __init__(self, publisher: _Optional[str] = ..., files: _Optional[_Iterable[_Union[HeldFile, _Mapping]]] = ...) -> None: ...

class HeldFile(_message.Message):
    __slots__ = ("path", "size")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class ReadManifestRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ...) -> None: ...

class ReadLeafTableRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ...) -> None: ...

class ReadFileRequest(_message.Message):
    __slots__ = ("model", "path", "offset", "length")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    path: str
    offset: int
    length: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadLeavesRequest(_message.Message):
    __slots__ = ("model", "ranges")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    ranges: _containers.RepeatedCompositeFieldContainer[TensorRange]
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., ranges: _Optional[_Iterable[_Union[TensorRange, _Mapping]]] = ...) -> None: ...

class TensorRange(_message.Message):
    __slots__ = ("tensor", "offset", "length")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    offset: int
    length: int
    def __init__(self, tensor: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ManifestPiece(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeafTablePiece(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FilePiece(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeafPiece(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
