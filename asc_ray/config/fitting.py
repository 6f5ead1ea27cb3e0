"""Whether the students that a configuration may train fit their device."""

from asc_ray.config.configuration import Config
from asc_ray.errors import ConfigError
from asc_ray.students.config import changed
from asc_ray.students.cost import student_cost


def check_limits(config: Config, scenes: int) -> None:
    """Raise ConfigError if a student that the configuration may train is over the limits.

    In a search, each end of each parameter is tried alone; its trials check the combinations.
    """
    students = {"student.model": config.student}
    for key, parameter in config.sweep.space.items() if config.sweep else ():
        if key.partition(".")[0] in ("model", "frontend"):
            for end in parameter.ends():
                students[f"sweep.space.{key}: {end}: student.model"] = changed(config.student, {key: end})
    for key, student in students.items():
        try:
            student_cost(student, config.limits, scenes)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
