"""RabbitMQ, and any other broker that speaks AMQP 0-9-1."""
