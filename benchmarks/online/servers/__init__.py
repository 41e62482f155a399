"""The models as each server wants them: run by that server's environment, never by ours."""
