"""Definitions are read from the files of a folder."""

import sys

from twinpath.features.definitions import read_definitions


def test_files_of_a_repository_may_import_each_other(tmp_path):
    (tmp_path / "of_users_entities.py").write_text(
        "from feast import Entity\nuser = Entity(name='user', join_keys=['user_id'])\n"
    )
    (tmp_path / "of_users_views.py").write_text(
        "from of_users_entities import user\nagain = user\n"
    )
    before = list(sys.path)
    [found] = read_definitions(tmp_path)
    assert found.name == "user"
    assert sys.path == before
