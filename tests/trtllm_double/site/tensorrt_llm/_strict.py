"""Objects with a fixed set of typed fields."""


class Strict:
    """Fields come from the class annotations; anything else raises, when made and when assigned."""

    def __init__(self, **given):
        fields = self.fields()
        for name, value in given.items():
            setattr(self, name, value)
        for name in fields:
            if name not in given:
                object.__setattr__(self, name, self.default(name))

    @classmethod
    def fields(cls):
        return {
            name: kind for base in reversed(cls.__mro__) for name, kind in vars(base).get("__annotations__", {}).items()
        }

    @classmethod
    def default(cls, name):
        if not hasattr(cls, name):
            raise TypeError(f"{cls.__name__}: missing argument {name!r}")
        return getattr(cls, name)

    def __setattr__(self, name, value):
        fields = self.fields()
        if name not in fields:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        kinds = fields[name]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if isinstance(value, bool) and bool not in kinds:
            raise TypeError(f"{type(self).__name__}.{name}: {value!r}")
        if not isinstance(value, tuple(kind or type(None) for kind in kinds)):
            raise TypeError(f"{type(self).__name__}.{name}: {value!r} is not one of {kinds}")
        object.__setattr__(self, name, value)
