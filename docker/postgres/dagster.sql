-- Run once by the postgres image on an empty volume. Dagster's tables live apart from the batch store's.
CREATE DATABASE dagster;
